//! Which BAR answers at which guest-physical address.
//!
//! The routes are a pure function of all configuration spaces: slots in order,
//! registers in order, each BAR that lies wholly inside a window and overlaps
//! no BAR before it. Whatever a guest programs therefore has one meaning, the
//! same after restore, and a BAR never covers RAM or another device.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::{BarKind, PciFunction};

/// The guest-physical address ranges that BARs may decode, in bytes.
/// They must not overlap RAM or anything else on the bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Below 4 GiB.
    pub low: Range<u64>,
    /// Above 4 GiB; empty when the address width leaves no room.
    pub high: Range<u64>,
}

impl Windows {
    /// Both, in address order.
    pub(super) fn all(&self) -> [&Range<u64>; 2] {
        [&self.low, &self.high]
    }

    fn hold(&self, base: u64, size: u64) -> bool {
        base.checked_add(size).is_some_and(|end| {
            self.all()
                .into_iter()
                .any(|w| w.start <= base && end <= w.end)
        })
    }

    /// The lowest free, aligned place for a BAR: 64-bit BARs go to the high
    /// window as long as it has room. `taken` lists base and size.
    pub(super) fn find(&self, kind: BarKind, size: u64, taken: &[(u64, u64)]) -> Option<u64> {
        let windows: &[&Range<u64>] = match kind {
            BarKind::Memory32 => &[&self.low],
            BarKind::Memory64 => &[&self.high, &self.low],
        };
        windows.iter().find_map(|w| gap(w, size, taken))
    }
}

/// The lowest multiple of `size` in `window` where `size` bytes are free.
fn gap(window: &Range<u64>, size: u64, taken: &[(u64, u64)]) -> Option<u64> {
    let mut base = window.start.checked_next_multiple_of(size)?;
    loop {
        let end = base.checked_add(size).filter(|end| *end <= window.end)?;
        let blocker = taken
            .iter()
            .filter(|(b, s)| *b < end && base < b.saturating_add(*s))
            .map(|(b, s)| b.saturating_add(*s))
            .max();
        match blocker {
            None => return Some(base),
            Some(after) => base = after.checked_next_multiple_of(size)?,
        }
    }
}

/// One BAR that decodes.
#[derive(Clone)]
pub(super) struct Route {
    pub bar: u8,
    pub size: u64,
    pub function: Arc<dyn PciFunction>,
}

impl Route {
    fn is(&self, other: &Self) -> bool {
        self.bar == other.bar && Arc::ptr_eq(&self.function, &other.function)
    }
}

/// All BARs that decode, by their base.
#[derive(Clone, Default)]
pub(super) struct Routes(BTreeMap<u64, Route>);

impl Routes {
    /// The routes for these functions, in slot order.
    pub fn compute(
        windows: &Windows,
        functions: impl Iterator<Item = Arc<dyn PciFunction>>,
    ) -> Self {
        let mut routes = Self::default();
        for function in functions {
            let decoded = function
                .config()
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .decoded();
            for (bar, base) in decoded {
                let Some(base) = base.filter(|base| windows.hold(*base, bar.size)) else {
                    continue;
                };
                if routes.overlap(base, bar.size) {
                    continue;
                }
                routes.0.insert(
                    base,
                    Route {
                        bar: bar.index,
                        size: bar.size,
                        function: Arc::clone(&function),
                    },
                );
            }
        }
        routes
    }

    fn overlap(&self, base: u64, size: u64) -> bool {
        let end = base.saturating_add(size);
        self.0
            .range(..end)
            .next_back()
            .is_some_and(|(other, route)| base < other.saturating_add(route.size))
    }

    /// The route whose BAR holds all of `address..address + len`, and the offset into it.
    pub fn find(&self, address: u64, len: usize) -> Option<(&Route, u64)> {
        let (base, route) = self.0.range(..=address).next_back()?;
        let offset = address.checked_sub(*base)?;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= route.size).then_some((route, offset))
    }

    /// The routes of `self` that `other` lacks.
    pub fn without<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = (u64, &'a Route)> {
        self.0
            .iter()
            .filter(|(base, route)| !other.0.get(base).is_some_and(|o| o.is(route)))
            .map(|(base, route)| (*base, route))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_gap_is_aligned_and_avoids_what_is_taken() {
        let window = 0xc000_1000..0xc040_0000;
        assert_eq!(gap(&window, 0x1000, &[]), Some(0xc000_1000));
        assert_eq!(gap(&window, MIB, &[]), Some(0xc010_0000));
        let taken = [(0xc010_0000, MIB), (0xc028_0000, 0x1000)];
        assert_eq!(gap(&window, MIB, &taken), Some(0xc030_0000));
        assert_eq!(gap(&window, 2 * MIB, &taken), None);
        assert_eq!(gap(&window, 1 << 40, &[]), None);
        assert_eq!(gap(&(u64::MAX - 5..u64::MAX), 0x1000, &[]), None);
        assert_eq!(gap(&(0..0), 0x1000, &[]), None);
    }

    #[test]
    fn a_wide_bar_falls_back_to_the_low_window() {
        let windows = Windows {
            low: 0xc000_0000..0xe000_0000,
            high: 0x1_0000_0000..0x1_0010_0000,
        };
        let find = |kind, size| windows.find(kind, size, &[]);
        assert_eq!(find(BarKind::Memory64, MIB), Some(0x1_0000_0000));
        assert_eq!(find(BarKind::Memory64, 2 * MIB), Some(0xc000_0000));
        assert_eq!(find(BarKind::Memory32, MIB), Some(0xc000_0000));
        assert_eq!(find(BarKind::Memory32, 1 << 30), None);
    }
}
