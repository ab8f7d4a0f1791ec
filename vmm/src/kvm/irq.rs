//! Interrupt lines and message-signalled interrupts by irqfd.
//!
//! A wired interrupt is an eventfd bound to a pin of the I/O APIC. A
//! message-signalled one gets an interrupt number and an eventfd when the
//! guest routes it first, so vectors that are never used cost nothing.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use devices::{IrqLine, MsiAllocator, MsiError, MsiMessage, MsiVector};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::KvmError;
use crate::layout::gsi::IOAPIC_PINS;

/// The interrupt numbers of one VM and where they lead.
#[derive(Clone)]
pub struct IrqRouter(Arc<Shared>);

struct Shared {
    vm: Arc<VmFd>,
    /// How many interrupt numbers KVM has.
    limit: u32,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// Numbers given out for vectors so far; the pins come before.
    allocated: u32,
    messages: BTreeMap<u32, MsiMessage>,
}

impl Table {
    fn set(&mut self, gsi: u32, message: Option<MsiMessage>) {
        match message {
            Some(message) => self.messages.insert(gsi, message),
            None => self.messages.remove(&gsi),
        };
    }
}

impl IrqRouter {
    /// A router for a VM whose interrupt controllers exist.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        let limit = u32::try_from(vm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        Self(Arc::new(Shared {
            vm,
            limit,
            table: Mutex::default(),
        }))
    }

    /// An edge-triggered line to a pin of the I/O APIC.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`] when the host is out of descriptors.
    pub fn line(&self, pin: u32) -> Result<Arc<dyn IrqLine>, KvmError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(|source| KvmError::Call {
            call: "eventfd",
            hint: "",
            source,
        })?;
        self.0
            .vm
            .register_irqfd(&event, pin)
            .map_err(KvmError::call("KVM_IRQFD"))?;
        Ok(Arc::new(Line(event)))
    }
}

impl MsiAllocator for IrqRouter {
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiVector>>, MsiError> {
        let mut table = self.0.table();
        let first = IOAPIC_PINS + table.allocated;
        let end = first.saturating_add(u32::from(count));
        if end > self.0.limit {
            return Err(MsiError::Exhausted { wanted: count });
        }
        table.allocated += u32::from(count);
        Ok((first..end)
            .map(|gsi| {
                let router = Arc::clone(&self.0);
                Arc::new(Vector {
                    router,
                    gsi,
                    event: OnceLock::new(),
                }) as Arc<dyn MsiVector>
            })
            .collect())
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells KVM all routes: the pins and the messages.
    fn commit(&self, table: &Table) -> Result<(), MsiError> {
        let mut entries: Vec<_> = (0..IOAPIC_PINS)
            .map(pin_route)
            .chain(
                table
                    .messages
                    .iter()
                    .map(|(&gsi, message)| message_route(gsi, *message)),
            )
            .collect();
        entries.sort_by_key(|e| e.gsi);
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|_| MsiError::Exhausted { wanted: 1 })?;
        self.vm.set_gsi_routing(&routing).map_err(host)
    }
}

fn host(error: kvm_ioctls::Error) -> MsiError {
    MsiError::Host(io::Error::from_raw_os_error(error.errno()))
}

/// A pin leads to the I/O APIC alone: the machine's tables know no PIC.
fn pin_route(pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    entry.u.irqchip.pin = pin;
    entry
}

fn message_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let [a0, a1, a2, a3, b0, b1, b2, b3] = message.address.to_le_bytes();
    entry.u.msi.address_lo = u32::from_le_bytes([a0, a1, a2, a3]);
    entry.u.msi.address_hi = u32::from_le_bytes([b0, b1, b2, b3]);
    entry.u.msi.data = message.data;
    entry
}

struct Line(EventFd);

impl IrqLine for Line {
    fn pulse(&self) {
        // An eventfd of KVM's is drained at once; a full one already says all.
        let _ = self.0.write(1);
    }
}

struct Vector {
    router: Arc<Shared>,
    gsi: u32,
    event: OnceLock<EventFd>,
}

impl Vector {
    /// Makes the eventfd and binds it to the interrupt number, once.
    fn bind(&self) -> Result<(), MsiError> {
        if self.event.get().is_some() {
            return Ok(());
        }
        let event = EventFd::new(EFD_NONBLOCK).map_err(MsiError::Host)?;
        self.router
            .vm
            .register_irqfd(&event, self.gsi)
            .map_err(host)?;
        // Routing happens under the function's MSI-X lock, so nobody else sets it.
        let _ = self.event.set(event);
        Ok(())
    }
}

impl MsiVector for Vector {
    fn signal(&self) {
        if let Some(event) = self.event.get() {
            // As for a line: a full eventfd already says all.
            let _ = event.write(1);
        }
    }

    fn route(&self, message: Option<MsiMessage>) -> Result<(), MsiError> {
        if message.is_some() {
            self.bind()?;
        }
        let mut table = self.router.table();
        let before = table.messages.get(&self.gsi).copied();
        if before == message {
            return Ok(());
        }
        table.set(self.gsi, message);
        let committed = self.router.commit(&table);
        if committed.is_err() {
            // KVM has the old routes still; so the next attempt is made in full.
            table.set(self.gsi, before);
        }
        committed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_keeps_both_halves_of_its_address() {
        let message = MsiMessage {
            address: 0x1_FEE0_0000,
            data: 0x41,
        };
        let entry = message_route(30, message);
        assert_eq!((entry.gsi, entry.type_), (30, KVM_IRQ_ROUTING_MSI));
        // SAFETY: the entry was just built as an MSI route.
        #[expect(unsafe_code, reason = "reads a union's field")]
        let msi = unsafe { entry.u.msi };
        assert_eq!(
            (msi.address_lo, msi.address_hi, msi.data),
            (0xFEE0_0000, 1, 0x41)
        );
    }
}
