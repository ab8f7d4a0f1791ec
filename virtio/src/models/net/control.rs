//! The control queue (Virtio 1.2, section 5.1.6.5): what the driver says of
//! filters, queues and offloads.
//!
//! A command is a class, a number and data, and is answered by one byte. A
//! command that was not negotiated, or whose data does not have its length to the byte, is
//! answered with an error and changes nothing.

use std::sync::Arc;

use net::{MacAddress, Offloads};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_ALLUNI,
    VIRTIO_NET_CTRL_RX_NOBCAST, VIRTIO_NET_CTRL_RX_NOMULTI, VIRTIO_NET_CTRL_RX_NOUNI,
    VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD,
    VIRTIO_NET_CTRL_VLAN_DEL, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_MQ,
};
use vm_memory::{Bytes, GuestAddress};

use super::bit;
use super::filter::{Filter, Table};
use super::shared::Shared;
use super::spec::{CONTROL_ERROR, CONTROL_OK};
use crate::memory::GuestMap;
use crate::ring::{Chain, Ring, RingError, take_front, take_last_byte, total};

/// The most data of a command that is read, in bytes: tables of more than 2000
/// addresses. It bounds what a command costs.
const MAX_DATA: u64 = 16 << 10;

/// The features that say what may be left to the driver, each with its offload.
const GUEST_OFFLOADS: [(u32, Offloads); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, Offloads::CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, Offloads::TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, Offloads::TSO6),
    (VIRTIO_NET_F_GUEST_ECN, Offloads::ECN),
    (VIRTIO_NET_F_GUEST_USO4, Offloads::USO),
    (VIRTIO_NET_F_GUEST_USO6, Offloads::USO),
];

/// The features, among those of [`guest_offloads`], that a driver may have switched off and on.
pub fn guest_offload_bits() -> u64 {
    GUEST_OFFLOADS
        .iter()
        .fold(0, |bits, (feature, _)| bits | bit(*feature))
}

/// What may be left to a driver that has accepted these features. UDP is
/// left to one that takes it over both versions of IP.
pub fn guest_offloads(features: u64) -> Offloads {
    let accepts = |feature: u32| features & bit(feature) != 0;
    let mut offloads = Offloads::empty();
    for (feature, offload) in GUEST_OFFLOADS {
        offloads.set(offload, accepts(feature) || offloads.contains(offload));
    }
    if !(accepts(VIRTIO_NET_F_GUEST_USO4) && accepts(VIRTIO_NET_F_GUEST_USO6)) {
        offloads.remove(Offloads::USO);
    }
    offloads.consistent()
}

/// What a driver's commands do.
pub trait Commands {
    /// Carries out one, with all of its data. `false` when there is no such command, or it cannot be; then nothing has changed.
    fn carry_out(&mut self, class: u32, command: u32, data: &[u8]) -> bool;
}

/// Serves the control queue.
pub struct Control<C = Card> {
    /// The queue.
    pub ring: Ring,
    commands: C,
    chain: Chain,
}

/// The commands of a card whose frames this process moves, or the host's kernel.
pub struct Card {
    shared: Arc<Shared>,
    features: u64,
}

impl Control {
    /// The features are those that the driver has accepted.
    pub fn new(ring: Ring, shared: Arc<Shared>, features: u64) -> Self {
        Self::with(ring, Card { shared, features })
    }
}

impl<C: Commands> Control<C> {
    /// Commands that come by this ring do what `commands` says.
    pub fn with(ring: Ring, commands: C) -> Self {
        Self {
            ring,
            commands,
            chain: Chain::default(),
        }
    }

    /// Carries out at most one ring full of commands; `true` when there may be more.
    ///
    /// # Errors
    ///
    /// [`RingError`]
    pub fn serve(&mut self, view: &GuestMap) -> Result<bool, RingError> {
        self.ring.quiet(view)?;
        for _ in 0..self.ring.size() {
            if !self.ring.take(view, &mut self.chain)? {
                return Ok(false);
            }
            let written = self.answer(view);
            self.ring.complete(view, self.chain.head, written)?;
        }
        Ok(true)
    }

    /// Does what the chain says, and returns how many bytes were written: none, where
    /// there is no room for an answer. Then nothing is done either.
    fn answer(&mut self, view: &GuestMap) -> u32 {
        let Some(at) = take_last_byte(&mut self.chain.writable) else {
            return 0;
        };
        if view.write_obj(CONTROL_ERROR, at).is_err() {
            return 0;
        }
        if self.command(view) {
            self.confirm(view, at);
        }
        1
    }

    fn confirm(&self, view: &GuestMap, at: GuestAddress) {
        // It was memory a moment ago.
        let _ = view.write_obj(CONTROL_OK, at);
    }

    fn command(&mut self, view: &GuestMap) -> bool {
        let readable = &mut self.chain.readable;
        let mut header = [0; 2];
        if !self.chain.ordered || !take_front(view, readable, &mut header) {
            return false;
        }
        let len = total(readable);
        let Some(len) = usize::try_from(len).ok().filter(|_| len <= MAX_DATA) else {
            return false;
        };
        let mut data = vec![0; len];
        if !take_front(view, readable, &mut data) {
            return false;
        }
        let [class, command] = header.map(u32::from);
        self.commands.carry_out(class, command, &data)
    }
}

impl Commands for Card {
    fn carry_out(&mut self, class: u32, command: u32, data: &[u8]) -> bool {
        match class {
            VIRTIO_NET_CTRL_RX => self.switch(command, data),
            VIRTIO_NET_CTRL_MAC => self.address(command, data),
            VIRTIO_NET_CTRL_VLAN => self.vlan(command, data),
            VIRTIO_NET_CTRL_ANNOUNCE => self.announced(command, data),
            VIRTIO_NET_CTRL_MQ => self.pairs(command, data),
            VIRTIO_NET_CTRL_GUEST_OFFLOADS => self.offloads(command, data),
            _ => false,
        }
    }
}

impl Card {
    fn accepts(&self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }

    fn switch(&self, command: u32, data: &[u8]) -> bool {
        let &[value @ (0 | 1)] = data else {
            return false;
        };
        let needs = match command {
            VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI => VIRTIO_NET_F_CTRL_RX,
            _ => VIRTIO_NET_F_CTRL_RX_EXTRA,
        };
        self.accepts(needs)
            && self.shared.change_filter(|filter| {
                let field = match command {
                    VIRTIO_NET_CTRL_RX_PROMISC => &mut filter.promiscuous,
                    VIRTIO_NET_CTRL_RX_ALLMULTI => &mut filter.all_multicast,
                    VIRTIO_NET_CTRL_RX_ALLUNI => &mut filter.all_unicast,
                    VIRTIO_NET_CTRL_RX_NOMULTI => &mut filter.no_multicast,
                    VIRTIO_NET_CTRL_RX_NOUNI => &mut filter.no_unicast,
                    VIRTIO_NET_CTRL_RX_NOBCAST => &mut filter.no_broadcast,
                    _ => return false,
                };
                *field = value == 1;
                true
            })
    }

    fn address(&self, command: u32, data: &[u8]) -> bool {
        match command {
            VIRTIO_NET_CTRL_MAC_TABLE_SET if self.accepts(VIRTIO_NET_F_CTRL_RX) => {
                let Some((unicast, rest)) = read_table(data) else {
                    return false;
                };
                let Some((multicast, [])) = read_table(rest) else {
                    return false;
                };
                self.set_tables(unicast, multicast)
            }
            VIRTIO_NET_CTRL_MAC_ADDR_SET if self.accepts(VIRTIO_NET_F_CTRL_MAC_ADDR) => {
                let mac = <[u8; 6]>::try_from(data).ok();
                let mac = mac.and_then(|octets| MacAddress::new(octets).ok());
                mac.is_some_and(|mac| {
                    self.shared.change_filter(|filter| {
                        filter.mac = mac.octets();
                        filter.former = None;
                        true
                    })
                })
            }
            _ => false,
        }
    }

    fn set_tables(&self, unicast: Table, multicast: Table) -> bool {
        self.shared.change_filter(|filter: &mut Filter| {
            filter.unicast = unicast;
            filter.multicast = multicast;
            true
        })
    }

    fn vlan(&self, command: u32, data: &[u8]) -> bool {
        let wanted = match command {
            VIRTIO_NET_CTRL_VLAN_ADD => true,
            VIRTIO_NET_CTRL_VLAN_DEL => false,
            _ => return false,
        };
        let Ok(id) = data.try_into().map(u16::from_le_bytes) else {
            return false;
        };
        self.accepts(VIRTIO_NET_F_CTRL_VLAN)
            && self
                .shared
                .change_filter(|filter| filter.set_vlan(id, wanted))
    }

    fn announced(&self, command: u32, data: &[u8]) -> bool {
        let known = command == VIRTIO_NET_CTRL_ANNOUNCE_ACK
            && data.is_empty()
            && self.accepts(VIRTIO_NET_F_GUEST_ANNOUNCE);
        if known {
            self.shared.set_announce(false);
        }
        known
    }

    fn pairs(&self, command: u32, data: &[u8]) -> bool {
        let Ok(pairs) = data.try_into().map(u16::from_le_bytes) else {
            return false;
        };
        command == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
            && self.accepts(VIRTIO_NET_F_MQ)
            && (1..=self.shared.max_pairs).contains(&pairs)
            && self.shared.set_pairs(pairs).is_ok()
    }

    fn offloads(&self, command: u32, data: &[u8]) -> bool {
        let Ok(bits) = data.try_into().map(u64::from_le_bytes) else {
            return false;
        };
        let may = self.features & guest_offload_bits();
        let done = command == VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET
            && self.accepts(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
            && bits & !may == 0
            && self.shared.set_offloads(guest_offloads(bits)).is_ok();
        if done {
            self.shared.set_guest_bits(bits);
        }
        done
    }
}

/// A count of four bytes and so many addresses, and what follows. Addresses past
/// the longest table there is make it one of everything.
fn read_table(data: &[u8]) -> Option<(Table, &[u8])> {
    let (count, rest) = data.split_first_chunk()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (addresses, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    let (addresses, _) = addresses.as_chunks();
    Some((Table::of(addresses.to_vec()), rest))
}
