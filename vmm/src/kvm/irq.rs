//! Interrupt lines and message-signalled interrupts by irqfd.
//!
//! A wired interrupt is an eventfd bound to a pin of the I/O APIC, or, where it
//! is a level, a call for each change. A message-signalled one gets an eventfd
//! when the guest routes it first, so vectors that are never used cost nothing;
//! its interrupt number is free again when the vector is dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use devices::{IrqLine, LevelLine, MsiAllocator, MsiError, MsiMessage, MsiVector};
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
    numbers: Numbers,
    messages: BTreeMap<u32, MsiMessage>,
}

/// The interrupt numbers of vectors; the pins come before.
#[derive(Default)]
struct Numbers {
    /// How many have ever been given out.
    fresh: u32,
    /// Given back, all below `IOAPIC_PINS + fresh`.
    free: BTreeSet<u32>,
}

impl Numbers {
    /// Gives out `count` numbers below `limit`, or none.
    fn take(&mut self, count: u16, limit: u32) -> Option<Vec<u32>> {
        let recycled = self.free.len().min(usize::from(count));
        let missing = u32::from(count).checked_sub(u32::try_from(recycled).ok()?)?;
        let first = IOAPIC_PINS.checked_add(self.fresh)?;
        let end = first.checked_add(missing).filter(|end| *end <= limit)?;
        self.fresh = self.fresh.checked_add(missing)?;
        let mut taken: Vec<u32> = (0..recycled).map_while(|_| self.free.pop_first()).collect();
        taken.extend(first..end);
        Some(taken)
    }

    fn give_back(&mut self, number: u32) {
        self.free.insert(number);
    }
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

    /// A level-triggered line to a pin of the I/O APIC, low at first.
    #[must_use]
    pub fn level(&self, pin: u32) -> Arc<dyn LevelLine> {
        Arc::new(Level {
            vm: Arc::clone(&self.0.vm),
            pin,
        })
    }
}

impl MsiAllocator for IrqRouter {
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiVector>>, MsiError> {
        let numbers = self.0.table().numbers.take(count, self.0.limit);
        let numbers = numbers.ok_or(MsiError::Exhausted { wanted: count })?;
        Ok(numbers
            .into_iter()
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

struct Level {
    vm: Arc<VmFd>,
    pin: u32,
}

impl LevelLine for Level {
    fn set(&self, high: bool) {
        // It fails only without interrupt controllers, which every machine has.
        if let Err(error) = self.vm.set_irq_line(self.pin, high) {
            tracing::error!(pin = self.pin, %error, "KVM_IRQ_LINE failed");
        }
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

impl Drop for Vector {
    /// Its eventfd closes, which ends the binding; the route is left to the
    /// next commit, for nothing signals it any more.
    fn drop(&mut self) {
        let mut table = self.router.table();
        table.set(self.gsi, None);
        table.numbers.give_back(self.gsi);
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

    fn trigger(&self) -> Result<Option<OwnedFd>, MsiError> {
        self.bind()?;
        let Some(event) = self.event.get() else {
            return Ok(None);
        };
        // SAFETY: the descriptor is open for as long as the vector has the eventfd.
        #[expect(unsafe_code, reason = "EventFd has no AsFd")]
        let event = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        let trigger = event.try_clone_to_owned().map_err(MsiError::Host)?;
        Ok(Some(trigger))
    }

    /// KVM looks at the eventfd while it is bound alone: unbound, it keeps count of what is added.
    fn hold(&self, held: bool) -> Result<(), MsiError> {
        let (Some(event), vm) = (self.event.get(), &self.router.vm) else {
            return Ok(());
        };
        if held {
            return vm.unregister_irqfd(event, self.gsi).map_err(host);
        }
        // It stays in the count when KVM finds it at the binding.
        let waits = event.read().is_ok();
        vm.register_irqfd(event, self.gsi).map_err(host)?;
        if waits {
            self.signal();
        }
        Ok(())
    }

    fn is_waiting(&self) -> bool {
        let Some(event) = self.event.get() else {
            return false;
        };
        // Read and put back: who adds to it meanwhile adds to what is put back.
        let waits = event.read().is_ok();
        if waits {
            self.signal();
        }
        waits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_and_never_go_out_twice() {
        let limit = IOAPIC_PINS + 8;
        let mut numbers = Numbers::default();
        let mut held = numbers.take(5, limit).unwrap();
        assert_eq!(numbers.take(4, limit), None, "all or none");
        // Far more often than there are numbers.
        for round in 0..100 {
            numbers.give_back(held.remove(round % held.len()));
            numbers.give_back(held.remove(round % held.len()));
            held.extend(numbers.take(4, limit).unwrap());
            let mut distinct = held.clone();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(distinct.len(), held.len());
            assert!(held.iter().all(|gsi| (IOAPIC_PINS..limit).contains(gsi)));
            for _ in 0..2 {
                numbers.give_back(held.remove(0));
            }
        }
        assert_eq!(numbers.take(3, limit).map(|n| n.len()), Some(3));
        assert_eq!(numbers.take(1, limit), None);
    }

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
