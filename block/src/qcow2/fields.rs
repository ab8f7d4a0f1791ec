//! Big-endian numbers within on-disk structures.

/// The number at `offset`; bytes past the end count as zeros.
#[inline]
pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let rest = bytes.get(offset..).unwrap_or_default();
    if let Some(field) = rest.first_chunk() {
        return u64::from_be_bytes(*field);
    }
    let mut field = [0; 8];
    field
        .iter_mut()
        .zip(rest)
        .for_each(|(to, from)| *to = *from);
    u64::from_be_bytes(field)
}

/// The number at `offset`; bytes past the end count as zeros.
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    (u64_at(bytes, offset) >> 32) as u32
}

/// The number at `offset`; bytes past the end count as zeros.
pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    (u64_at(bytes, offset) >> 48) as u16
}

/// Overwrites the bytes at `offset`; what is past the end is dropped.
pub(crate) fn put(bytes: &mut [u8], offset: usize, field: &[u8]) {
    let room = bytes.get_mut(offset..).unwrap_or_default();
    room.iter_mut()
        .zip(field)
        .for_each(|(to, from)| *to = *from);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_past_the_end_are_zeros() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        assert_eq!(u64_at(&bytes, 1), 0x0203_0405_0607_0809);
        assert_eq!(u64_at(&bytes, 5), 0x0607_0809_0000_0000);
        assert_eq!(u32_at(&bytes, 7), 0x0809_0000);
        assert_eq!(u16_at(&bytes, 0), 0x0102);
        assert_eq!(u16_at(&bytes, 8), 0x0900);
        assert_eq!(u64_at(&bytes, 100), 0);
    }

    #[test]
    fn puts_past_the_end_are_dropped() {
        let mut bytes = [0; 4];
        put(&mut bytes, 2, &[1, 2, 3]);
        put(&mut bytes, 9, &[1]);
        assert_eq!(bytes, [0, 0, 1, 2]);
    }
}
