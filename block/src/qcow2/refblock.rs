//! Entries of refcount blocks ("Refcount block entry"): big-endian numbers of 1 to 64 bits, those of less than a
//! byte with the first in the lowest bits.

/// How many refcounts of `1 << order` bits fit into this many bytes.
pub(crate) fn capacity(len: usize, order: u32) -> usize {
    if order < 3 {
        len.saturating_mul(8 >> order)
    } else {
        len >> (order - 3)
    }
}

/// The refcount at `index`; 0 past the end.
pub(crate) fn get(block: &[u8], index: usize, order: u32) -> u64 {
    if order < 3 {
        let byte = block.get(index >> (3 - order)).copied().unwrap_or(0);
        return u64::from(byte >> shift(index, order)) & max(order);
    }
    let len = 1_usize << (order - 3);
    let start = index.saturating_mul(len);
    let bytes = block
        .get(start..start.saturating_add(len))
        .unwrap_or_default();
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Sets the refcount at `index`, of which `value` must be in range; nothing happens past the end.
pub(crate) fn set(block: &mut [u8], index: usize, order: u32, value: u64) {
    if order < 3 {
        if let Some(byte) = block.get_mut(index >> (3 - order)) {
            let shift = shift(index, order);
            let [.., low] = value.to_be_bytes();
            let [.., mask] = max(order).to_be_bytes();
            *byte = *byte & !(mask << shift) | (low & mask) << shift;
        }
        return;
    }
    let len = 1_usize << (order - 3);
    let start = index.saturating_mul(len);
    let bytes = block
        .get_mut(start..start.saturating_add(len))
        .unwrap_or_default();
    bytes
        .iter_mut()
        .rev()
        .zip(value.to_be_bytes().iter().rev())
        .for_each(|(to, from)| *to = *from);
}

/// The largest refcount of `1 << order` bits.
fn max(order: u32) -> u64 {
    u64::MAX >> (64 - (1_u32 << order))
}

/// Where within its byte a refcount of less than a byte is.
fn shift(index: usize, order: u32) -> u32 {
    let within = index & ((8 >> order) - 1);
    // Below 8, as it is the number of one of at most 8 in a byte.
    u32::try_from(within << order).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_holds_its_values_apart() {
        for order in 0..=6 {
            let mut block = [0; 64];
            let values: Vec<u64> = (0..capacity(64, order) as u64)
                .map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) & max(order))
                .collect();
            for (index, value) in values.iter().enumerate() {
                set(&mut block, index, order, max(order));
                set(&mut block, index, order, *value);
            }
            let read: Vec<u64> = (0..values.len())
                .map(|index| get(&block, index, order))
                .collect();
            assert_eq!(read, values, "order {order}");
            set(&mut block, values.len(), order, 1);
            assert_eq!(get(&block, values.len(), order), 0);
        }
    }

    #[test]
    fn small_refcounts_start_in_the_low_bits() {
        let mut block = [0; 2];
        set(&mut block, 0, 0, 1);
        set(&mut block, 9, 0, 1);
        assert_eq!(block, [1, 2]);
        set(&mut block, 1, 2, 0xa);
        assert_eq!(block, [0xa1, 2]);
        set(&mut block, 0, 4, 0x0102);
        assert_eq!(block, [1, 2]);
    }
}
