//! The few colours of a piece of a picture.

/// Places of the table; a power of two, more than twice the colours.
const PLACES: usize = 1024;

/// Up to 256 colours, numbered as they came.
#[derive(Debug)]
pub struct Palette {
    /// One more than the number of the colour that belongs there, or 0.
    places: Box<[u16; PLACES]>,
    colours: Vec<u32>,
}

impl Palette {
    /// The colours of `values`; none where there are more than `most`, which is at most 256.
    pub fn of(values: &[u32], most: usize) -> Option<Self> {
        let mut palette = Self {
            places: Box::new([0; PLACES]),
            colours: Vec::new(),
        };
        let mut last = None;
        for value in values {
            if last == Some(*value) {
                continue;
            }
            last = Some(*value);
            if let Err(place) = palette.find(*value) {
                if palette.colours.len() >= most.min(256) {
                    return None;
                }
                palette.colours.push(*value);
                palette.places[place] = u16::try_from(palette.colours.len()).ok()?;
            }
        }
        Some(palette)
    }

    /// The colours, by their numbers.
    pub fn colours(&self) -> &[u32] {
        &self.colours
    }

    /// The number of a colour; 0 for one that it has not.
    pub fn number(&self, value: u32) -> u8 {
        self.find(value).unwrap_or(0)
    }

    /// A colour's number, or where it would be.
    fn find(&self, value: u32) -> Result<u8, usize> {
        let hash = value.wrapping_mul(0x9e37_79b1) >> 22;
        let mut place = usize::try_from(hash).unwrap_or(0) % PLACES;
        // There are always free places.
        loop {
            let Some(number) = self.places[place].checked_sub(1) else {
                return Err(place);
            };
            if self.colours.get(usize::from(number)) == Some(&value) {
                return Ok(u8::try_from(number).unwrap_or(u8::MAX));
            }
            place = (place + 1) % PLACES;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_numbered_as_they_come_up_to_the_most() {
        let palette = Palette::of(&[7, 7, 9, 7, 3], 3).unwrap();
        assert_eq!(palette.colours(), [7, 9, 3]);
        assert_eq!([7, 9, 3].map(|value| palette.number(value)), [0, 1, 2]);
        assert!(Palette::of(&[7, 9, 3], 2).is_none());
    }

    #[test]
    fn colours_of_one_place_are_kept_apart() {
        // All multiples of 2^22 and more fall together after the multiplication's shift.
        let values: Vec<u32> = (0..256).map(|at| at << 24).collect();
        let palette = Palette::of(&values, 256).unwrap();
        for (number, value) in (0..=255).zip(&values) {
            assert_eq!(palette.number(*value), number);
        }
    }
}
