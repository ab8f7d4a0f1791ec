//! What is kept of a network device while the machine is not there.

use migration::{RestoreError, SaveError, SavedState, Snapshot, decode_exact};
use net::MacAddress;
use serde::{Deserialize, Serialize};

use super::Net;
use super::control::guest_offload_bits;
use super::filter::{Filter, MAX_TABLE, Table};

/// The registers of a network device.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetV1 {
    /// The address, as the driver has set it.
    pub mac: [u8; 6],
    /// How many pairs of queues the driver uses, from 1.
    pub pairs: u16,
    /// The features that say what is left to the driver.
    pub guest_offloads: u64,
    /// The link as it was set from outside.
    pub link: bool,
    /// All frames are wanted.
    pub promiscuous: bool,
    /// All that are for many.
    pub all_multicast: bool,
    /// All that are for one.
    pub all_unicast: bool,
    /// None that are for many.
    pub no_multicast: bool,
    /// None that are for one.
    pub no_unicast: bool,
    /// None that are for all.
    pub no_broadcast: bool,
    /// More addresses of the device; `None`: too many, all.
    pub unicast: Option<Vec<[u8; 6]>>,
    /// Groups that it is in; `None`: too many, all.
    pub multicast: Option<Vec<[u8; 6]>>,
    /// A bit for each VLAN that is wanted, in 64 words; `None`: all.
    pub vlans: Option<Vec<u64>>,
}

/// The registers of a network device, and what its driver has not seen yet.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetV2 {
    /// The registers.
    pub registers: NetV1,
    /// The address with which a driver goes on that has read it, where the device has another one now.
    pub former: Option<[u8; 6]>,
    /// The driver is to see the link go down and up, and has not seen it down.
    pub blinks: bool,
}

impl SavedState for NetV2 {
    const SCHEMA: &'static str = "virtio-net";
    const VERSION: u16 = 2;

    fn upgrade(found: u16, body: &[u8]) -> Result<Self, RestoreError> {
        match found {
            1 => Ok(Self {
                registers: decode_exact(Self::SCHEMA, found, body)?,
                former: None,
                blinks: false,
            }),
            Self::VERSION => decode_exact(Self::SCHEMA, found, body),
            _ => Err(RestoreError::Version {
                schema: Self::SCHEMA,
                found,
                newest: Self::VERSION,
            }),
        }
    }
}

fn invalid(reason: String) -> RestoreError {
    RestoreError::Invalid {
        schema: NetV2::SCHEMA,
        reason,
    }
}

fn table(addresses: Option<Vec<[u8; 6]>>) -> Result<Table, RestoreError> {
    match addresses {
        None => Ok(Table::all()),
        Some(addresses) if addresses.len() <= MAX_TABLE => Ok(Table::of(addresses)),
        Some(addresses) => Err(invalid(format!(
            "a table of {} addresses, of at most {MAX_TABLE}",
            addresses.len()
        ))),
    }
}

impl Snapshot for Net {
    type State = NetV2;

    fn save(&self) -> Result<NetV2, SaveError> {
        let Filter {
            mac,
            former,
            promiscuous,
            all_multicast,
            all_unicast,
            no_multicast,
            no_unicast,
            no_broadcast,
            unicast,
            multicast,
            vlans,
        } = &*self.shared.filter();
        let registers = NetV1 {
            mac: *mac,
            pairs: self.shared.pairs(),
            guest_offloads: self.shared.guest_bits(),
            link: self.shared.cable(),
            promiscuous: *promiscuous,
            all_multicast: *all_multicast,
            all_unicast: *all_unicast,
            no_multicast: *no_multicast,
            no_unicast: *no_unicast,
            no_broadcast: *no_broadcast,
            unicast: unicast.addresses().map(<[_]>::to_vec),
            multicast: multicast.addresses().map(<[_]>::to_vec),
            vlans: vlans.as_ref().map(|vlans| vlans.to_vec()),
        };
        Ok(NetV2 {
            registers,
            former: *former,
            blinks: self.renewed || self.shared.blinks(),
        })
    }

    fn restore(&mut self, state: NetV2) -> Result<(), RestoreError> {
        let NetV2 {
            registers,
            former,
            blinks,
        } = state;
        let NetV1 {
            mac,
            pairs,
            guest_offloads,
            link,
            promiscuous,
            all_multicast,
            all_unicast,
            no_multicast,
            no_unicast,
            no_broadcast,
            unicast,
            multicast,
            vlans,
        } = registers;
        let max = self.settings.pairs;
        if !(1..=max).contains(&pairs) {
            return Err(invalid(format!(
                "{} has {max} pairs of queues, and the saved machine used {pairs}",
                self.shared.id
            )));
        }
        if guest_offloads & !(guest_offload_bits() & self.features()) != 0 {
            return Err(invalid(format!(
                "the network of {} cannot do what it did in the saved machine ({guest_offloads:#x})",
                self.shared.id
            )));
        }
        for address in [Some(mac), former].into_iter().flatten() {
            MacAddress::new(address).map_err(|error| invalid(error.to_string()))?;
        }
        let vlans = vlans.map(<[u64; _]>::try_from).transpose();
        let vlans = vlans.map_err(|vlans| invalid(format!("{} words of VLANs", vlans.len())))?;
        let filter = Filter {
            mac,
            former,
            promiscuous,
            all_multicast,
            all_unicast,
            no_multicast,
            no_unicast,
            no_broadcast,
            unicast: table(unicast)?,
            multicast: table(multicast)?,
            vlans: vlans.map(Box::new),
        };
        self.shared.change_filter(|old| {
            *old = filter;
            true
        });
        // The network hears of both at the start.
        self.shared.set_guest_bits(guest_offloads);
        self.shared.note_pairs(pairs);
        self.shared.set_cable(link);
        self.restored = true;
        self.renewed = blinks;
        Ok(())
    }
}
