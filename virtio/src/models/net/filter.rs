//! Which frames the driver wants (Virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3).

use net::MacAddress;

use super::spec::TAGGED_LEN;

/// The most addresses in either table. With more, all such frames are wanted.
pub const MAX_TABLE: usize = 64;

/// How many VLANs there can be, in words of 64.
pub const VLAN_WORDS: usize = 64;

/// The type of a tagged frame (IEEE 802.1Q), big endian.
const TAGGED: [u8; 2] = [0x81, 0x00];

/// Addresses of one kind that are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// The addresses, if there are not too many.
    addresses: Vec<[u8; 6]>,
    /// There were too many: all are wanted.
    overflowed: bool,
}

impl Table {
    /// These addresses; all, when they are more than [`MAX_TABLE`].
    pub fn of(addresses: Vec<[u8; 6]>) -> Self {
        if addresses.len() > MAX_TABLE {
            return Self::all();
        }
        Self {
            addresses,
            overflowed: false,
        }
    }

    /// All addresses.
    pub fn all() -> Self {
        Self {
            addresses: Vec::new(),
            overflowed: true,
        }
    }

    /// The addresses; `None` when all are wanted.
    pub fn addresses(&self) -> Option<&[[u8; 6]]> {
        (!self.overflowed).then_some(&self.addresses)
    }

    fn has(&self, address: &[u8; 6]) -> bool {
        self.overflowed || self.addresses.contains(address)
    }
}

/// Which frames the driver wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The device's address as the driver has set it.
    pub mac: [u8; 6],
    /// The address that the driver has read, where that was another, until it is begun anew or sets one.
    pub former: Option<[u8; 6]>,
    /// All frames.
    pub promiscuous: bool,
    /// All that are for many.
    pub all_multicast: bool,
    /// All that are for one.
    pub all_unicast: bool,
    /// None that are for many, but those for all.
    pub no_multicast: bool,
    /// None that are for one.
    pub no_unicast: bool,
    /// None that are for all.
    pub no_broadcast: bool,
    /// More addresses of the device.
    pub unicast: Table,
    /// Groups that it is in.
    pub multicast: Table,
    /// A bit for each VLAN that is wanted; `None`: all are.
    pub vlans: Option<Box<[u64; VLAN_WORDS]>>,
}

impl Filter {
    /// What is wanted before the driver has said anything: everything.
    pub fn open(mac: MacAddress) -> Self {
        Self {
            mac: mac.octets(),
            former: None,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Table::default(),
            multicast: Table::default(),
            vlans: None,
        }
    }

    /// Whether there is no need to look at a frame.
    pub fn wants_everything(&self) -> bool {
        self.promiscuous
    }

    /// Whether a frame that begins with `start` is wanted. What it does not reach to is zero.
    pub fn wants(&self, start: &[u8; TAGGED_LEN]) -> bool {
        if self.promiscuous {
            return true;
        }
        let [a, b, c, d, e, f, _, _, _, _, _, _, t, u, high, low, ..] = *start;
        if [t, u] == TAGGED && !self.wants_vlan(u16::from_be_bytes([high, low]) & 0xfff) {
            return false;
        }
        let to = [a, b, c, d, e, f];
        if to == [0xff; 6] {
            !self.no_broadcast
        } else if a & 1 != 0 {
            !self.no_multicast && (self.all_multicast || self.multicast.has(&to))
        } else {
            !self.no_unicast
                && (self.all_unicast
                    || to == self.mac
                    || Some(to) == self.former
                    || self.unicast.has(&to))
        }
    }

    fn wants_vlan(&self, id: u16) -> bool {
        let Some(vlans) = &self.vlans else {
            return true;
        };
        let word = vlans.get(usize::from(id / 64)).copied().unwrap_or(0);
        word >> (id % 64) & 1 == 1
    }

    /// Wants frames of a VLAN or not. `false`, with all as it was, when there is no such VLAN. A driver that leaves
    /// one before it has named any has none to be left without: frames of all go on to come.
    pub fn set_vlan(&mut self, id: u16, wanted: bool) -> bool {
        let place = usize::from(id / 64);
        if place >= VLAN_WORDS {
            return false;
        }
        if self.vlans.is_none() && !wanted {
            return true;
        }
        let vlans = self.vlans.get_or_insert_with(|| Box::new([0; VLAN_WORDS]));
        if let Some(word) = vlans.get_mut(place) {
            let bit = 1 << (id % 64);
            *word = if wanted { *word | bit } else { *word & !bit };
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
    const ALL: [u8; 6] = [0xff; 6];

    fn closed() -> Filter {
        Filter {
            promiscuous: false,
            ..Filter::open(MacAddress::new(MAC).unwrap())
        }
    }

    fn start(to: [u8; 6]) -> [u8; TAGGED_LEN] {
        let mut start = [0; TAGGED_LEN];
        start[..6].copy_from_slice(&to);
        start
    }

    fn tagged(to: [u8; 6], id: u16) -> [u8; TAGGED_LEN] {
        let mut start = start(to);
        start[12..14].copy_from_slice(&TAGGED);
        // With a priority.
        start[14..16].copy_from_slice(&(0xe000 | id).to_be_bytes());
        start
    }

    /// Which of a frame to itself, another, a group and all are wanted.
    fn wanted(filter: &Filter) -> [bool; 4] {
        [MAC, OTHER, GROUP, ALL].map(|to| filter.wants(&start(to)))
    }

    #[test]
    fn frames_are_wanted_by_address_and_switch() {
        type Case = (fn(&mut Filter), [bool; 4]);
        let cases: [Case; 10] = [
            (|_| {}, [true, false, false, true]),
            (|f| f.promiscuous = true, [true; 4]),
            (|f| f.all_multicast = true, [true, false, true, true]),
            (|f| f.all_unicast = true, [true, true, false, true]),
            (|f| f.no_unicast = true, [false, false, false, true]),
            (|f| f.no_broadcast = true, [true, false, false, false]),
            (
                |f| (f.all_multicast, f.no_multicast) = (true, true),
                [true, false, false, true],
            ),
            (
                |f| f.unicast = Table::of(vec![OTHER]),
                [true, true, false, true],
            ),
            (
                |f| f.multicast = Table::of(vec![GROUP]),
                [true, false, true, true],
            ),
            (|f| f.mac = OTHER, [false, true, false, true]),
        ];
        for (number, (change, expected)) in cases.into_iter().enumerate() {
            let mut filter = closed();
            change(&mut filter);
            assert_eq!(wanted(&filter), expected, "case {number}");
        }
    }

    #[test]
    fn a_table_that_is_too_long_is_one_of_everything() {
        let mut filter = closed();
        filter.multicast = Table::of(vec![[3; 6]; MAX_TABLE]);
        assert!(!filter.wants(&start(GROUP)));
        filter.multicast = Table::of(vec![[3; 6]; MAX_TABLE + 1]);
        assert!(filter.wants(&start(GROUP)) && !filter.wants(&start(OTHER)));
    }

    #[test]
    fn vlans_are_filtered_once_one_has_been_named() {
        let mut filter = closed();
        assert!(filter.wants(&tagged(MAC, 7)));
        assert!(filter.set_vlan(4095, true) && filter.set_vlan(64, true));
        for (id, expected) in [(0, false), (7, false), (64, true), (4095, true)] {
            assert_eq!(filter.wants(&tagged(MAC, id)), expected, "{id}");
        }
        assert!(filter.wants(&start(MAC)) && !filter.wants(&tagged(OTHER, 64)));
        assert!(filter.set_vlan(64, false));
        assert!(!filter.wants(&tagged(MAC, 64)));
        // The last one that is left leaves none.
        assert!(filter.set_vlan(4095, false));
        assert!(!filter.wants(&tagged(MAC, 4095)));
    }

    #[test]
    fn what_was_never_named_can_be_left_and_what_there_is_not_changes_nothing() {
        let mut filter = closed();
        assert!(filter.set_vlan(7, false));
        assert!(!filter.set_vlan(4096, true) && !filter.set_vlan(u16::MAX, false));
        assert_eq!(filter, closed());
        assert!(filter.wants(&tagged(MAC, 7)) && filter.wants(&tagged(MAC, 64)));
    }
}
