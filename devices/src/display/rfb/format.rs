//! How a client wants its pixels (RFC 6143, section 7.4), and turning ours into them.

use thiserror::Error;

/// Bytes of a pixel format on the wire.
pub const FORMAT_LEN: usize = 16;

/// A client's pixel format that can be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientFormat {
    /// 1, 2 or 4.
    bytes: usize,
    depth: u8,
    big_endian: bool,
    /// The client looks colours up in a map of ours.
    mapped: bool,
    red: Channel,
    green: Channel,
    blue: Channel,
}

/// Where a colour's bits are in a pixel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Channel {
    /// The brightest: one less than a power of two.
    max: u16,
    shift: u8,
}

/// Why a pixel format cannot be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FormatError {
    /// Not 8, 16 or 32 bits.
    #[error("pixels of {0} bits; 8, 16 and 32 are served")]
    Bits(u8),
    /// None, or more than the pixel has.
    #[error("a depth of {depth} in pixels of {bits} bits")]
    Depth {
        /// The bits that are said to mean something.
        depth: u8,
        /// Bits of a pixel.
        bits: u8,
    },
    /// A colour's bits are none, are not in one piece, or reach past the pixel.
    #[error("a colour up to {max} from bit {shift} in pixels of {bits} bits")]
    Channel {
        /// The brightest.
        max: u16,
        /// The lowest bit.
        shift: u8,
        /// Bits of a pixel.
        bits: u8,
    },
    /// A colour map of more than 256 entries.
    #[error("a colour map for pixels of {0} bits; 8 are served")]
    Map(u8),
}

/// How much of a pixel an encoding sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// All bytes of it.
    Plain,
    /// `CPIXEL` of ZRLE (RFC 6143, section 7.7.5): three bytes where they hold all colours.
    Zrle,
    /// `TPIXEL` of Tight: red, green and blue where each has a byte.
    Tight,
}

impl ClientFormat {
    /// What the server offers: `0x00RRGGBB`, little-endian.
    pub const SERVER: Self = Self {
        bytes: 4,
        depth: 24,
        big_endian: false,
        mapped: false,
        red: Channel {
            max: 255,
            shift: 16,
        },
        green: Channel { max: 255, shift: 8 },
        blue: Channel { max: 255, shift: 0 },
    };

    /// What a colour map holds: 3 bits each of red and green, 2 of blue.
    const MAPPED: Self = Self {
        bytes: 1,
        depth: 8,
        big_endian: false,
        mapped: true,
        red: Channel { max: 7, shift: 0 },
        green: Channel { max: 7, shift: 3 },
        blue: Channel { max: 3, shift: 6 },
    };

    /// A format as it is on the wire.
    ///
    /// # Errors
    ///
    /// [`FormatError`], where it is of no use.
    pub fn parse(wire: &[u8; FORMAT_LEN]) -> Result<Self, FormatError> {
        let [bits, depth, big_endian, true_colour, colours @ ..] = *wire;
        let bytes = match bits {
            8 => 1,
            16 => 2,
            32 => 4,
            _ => return Err(FormatError::Bits(bits)),
        };
        if depth == 0 || depth > bits {
            return Err(FormatError::Depth { depth, bits });
        }
        if true_colour == 0 {
            return if bits == 8 {
                Ok(Self::MAPPED)
            } else {
                Err(FormatError::Map(bits))
            };
        }
        let [r0, r1, g0, g1, b0, b1, red, green, blue, ..] = colours;
        Ok(Self {
            bytes,
            depth,
            big_endian: big_endian != 0,
            mapped: false,
            red: Channel::new(u16::from_be_bytes([r0, r1]), red, bits)?,
            green: Channel::new(u16::from_be_bytes([g0, g1]), green, bits)?,
            blue: Channel::new(u16::from_be_bytes([b0, b1]), blue, bits)?,
        })
    }

    /// Appends it as it is on the wire.
    pub fn write(&self, out: &mut Vec<u8>) {
        let bits = [8, 16, 0, 32].get(self.bytes - 1).copied();
        out.extend([bits.unwrap_or(32), self.depth]);
        out.extend([u8::from(self.big_endian), u8::from(!self.mapped)]);
        for channel in [self.red, self.green, self.blue] {
            out.extend(channel.max.to_be_bytes());
        }
        out.extend([self.red.shift, self.green.shift, self.blue.shift, 0, 0, 0]);
    }

    /// Whether the client is to be sent [`colour_map`].
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        self.mapped
    }

    /// Whether a picture of photographic quality makes sense to it: `TightVNC` sends none to pixels of 8 bits.
    #[must_use]
    pub fn takes_jpeg(&self) -> bool {
        self.bytes > 1
    }

    /// The bits of all colours.
    fn mask(&self) -> u32 {
        [self.red, self.green, self.blue]
            .iter()
            .fold(0, |mask, channel| mask | channel.value(255))
    }

    fn is_whole_bytes(&self) -> bool {
        let full = [self.red, self.green, self.blue]
            .iter()
            .all(|channel| channel.max == 255);
        self.bytes == 4 && self.depth == 24 && full
    }
}

impl Channel {
    fn new(max: u16, shift: u8, bits: u8) -> Result<Self, FormatError> {
        let width = max.count_ones();
        let whole = width > 0 && width == max.trailing_ones();
        if !whole || u32::from(shift) + width > u32::from(bits) {
            return Err(FormatError::Channel { max, shift, bits });
        }
        Ok(Self { max, shift })
    }

    /// The bits for a brightness of 0 to 255.
    fn value(self, level: u8) -> u32 {
        ((u32::from(level) * u32::from(self.max) + 127) / 255) << self.shift
    }
}

/// A message that sets all colours of a client with a map (RFC 6143, section 7.6.2).
pub fn colour_map(out: &mut Vec<u8>) {
    out.extend([1, 0, 0, 0, 1, 0]);
    let format = ClientFormat::MAPPED;
    for entry in 0..=u8::MAX {
        for channel in [format.red, format.green, format.blue] {
            let level = u16::from(entry >> channel.shift) & channel.max;
            let full = u32::from(level) * 0xffff / u32::from(channel.max);
            out.extend(u16::try_from(full).unwrap_or(u16::MAX).to_be_bytes());
        }
    }
}

/// Turns `0x00RRGGBB` into what an encoding sends for a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Translation {
    /// For each level of red, green and blue, its bits in the order of the wire, the first byte lowest.
    tables: Box<[[u32; 256]; 3]>,
    bytes: usize,
}

impl Translation {
    /// For pixels of `format`, packed as `packing` says.
    #[must_use]
    pub fn new(format: &ClientFormat, packing: Packing) -> Self {
        let mut tables = Box::new([[0; 256]; 3]);
        let swap = |value: u32| match (format.big_endian, format.bytes) {
            (true, 4) => value.swap_bytes(),
            (true, 2) => value.swap_bytes() >> 16,
            _ => value,
        };
        let mut bytes = format.bytes;
        let mut drop = 0;
        if packing == Packing::Zrle && format.bytes == 4 && format.depth <= 24 {
            let mask = swap(format.mask());
            if mask >> 24 == 0 {
                bytes = 3;
            } else if mask & 0xff == 0 {
                (bytes, drop) = (3, 8);
            }
        }
        let channels = [format.red, format.green, format.blue];
        let whole = packing == Packing::Tight && format.is_whole_bytes();
        if whole {
            bytes = 3;
        }
        for ((table, channel), place) in tables.iter_mut().zip(channels).zip([0, 8, 16]) {
            for (entry, level) in table.iter_mut().zip(0..=u8::MAX) {
                *entry = if whole {
                    u32::from(level) << place
                } else {
                    swap(channel.value(level)) >> drop
                };
            }
        }
        Self { tables, bytes }
    }

    /// Bytes of what is sent for a pixel.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What is sent for a pixel, the first byte lowest.
    #[must_use]
    pub fn pixel(&self, pixel: u32) -> u32 {
        let [blue, green, red, _] = pixel.to_le_bytes();
        let [reds, greens, blues] = &*self.tables;
        reds[usize::from(red)] | greens[usize::from(green)] | blues[usize::from(blue)]
    }
}

/// Appends the first `bytes` bytes of a translated pixel.
pub fn put(out: &mut Vec<u8>, value: u32, bytes: usize) {
    let wire = value.to_le_bytes();
    out.extend_from_slice(wire.get(..bytes).unwrap_or(&wire));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(bits: u8, depth: u8, big: u8, maxes: [u16; 3], shifts: [u8; 3]) -> [u8; 16] {
        let mut out = vec![bits, depth, big, 1];
        for max in maxes {
            out.extend(max.to_be_bytes());
        }
        out.extend(shifts);
        out.extend([0; 3]);
        out.try_into().unwrap()
    }

    fn sent(format: &ClientFormat, packing: Packing, pixel: u32) -> Vec<u8> {
        let translation = Translation::new(format, packing);
        let mut out = Vec::new();
        put(&mut out, translation.pixel(pixel), translation.bytes());
        out
    }

    const WHOLE: [u16; 3] = [255; 3];

    #[test]
    fn the_own_format_is_read_back_as_it_is_written() {
        let mut out = Vec::new();
        ClientFormat::SERVER.write(&mut out);
        let wire = out.as_slice().try_into().unwrap();
        assert_eq!(ClientFormat::parse(wire), Ok(ClientFormat::SERVER));
    }

    #[test]
    fn formats_of_no_use_are_refused() {
        for bits in [0, 1, 4, 24, 255] {
            let parsed = ClientFormat::parse(&wire(bits, 8, 0, WHOLE, [0; 3]));
            assert_eq!(parsed, Err(FormatError::Bits(bits)));
        }
        for depth in [0, 33, 255] {
            let parsed = ClientFormat::parse(&wire(32, depth, 0, WHOLE, [0; 3]));
            assert!(matches!(parsed, Err(FormatError::Depth { .. })), "{depth}");
        }
        for (max, shift) in [(0, 0), (254, 0), (255, 25), (255, 255), (0xffff, 17)] {
            let parsed = ClientFormat::parse(&wire(32, 24, 0, [max; 3], [shift; 3]));
            assert!(matches!(parsed, Err(FormatError::Channel { .. })), "{max}");
        }
        let mut map = wire(16, 16, 0, WHOLE, [0; 3]);
        map[3] = 0;
        assert_eq!(ClientFormat::parse(&map), Err(FormatError::Map(16)));
    }

    #[test]
    fn pixels_have_the_order_and_size_that_the_client_wants() {
        let little = ClientFormat::SERVER;
        assert_eq!(sent(&little, Packing::Plain, 0x0001_0203), [3, 2, 1, 0]);
        assert_eq!(sent(&little, Packing::Zrle, 0x0001_0203), [3, 2, 1]);
        assert_eq!(sent(&little, Packing::Tight, 0x0001_0203), [1, 2, 3]);
        let big = ClientFormat::parse(&wire(32, 24, 1, WHOLE, [16, 8, 0])).unwrap();
        assert_eq!(sent(&big, Packing::Plain, 0x0001_0203), [0, 1, 2, 3]);
        assert_eq!(sent(&big, Packing::Zrle, 0x0001_0203), [1, 2, 3]);
        let high = ClientFormat::parse(&wire(32, 24, 0, WHOLE, [24, 16, 8])).unwrap();
        assert_eq!(sent(&high, Packing::Plain, 0x0001_0203), [0, 3, 2, 1]);
        assert_eq!(sent(&high, Packing::Zrle, 0x0001_0203), [3, 2, 1]);
        let short = wire(16, 16, 1, [31, 63, 31], [11, 5, 0]);
        let short = ClientFormat::parse(&short).unwrap();
        assert_eq!(sent(&short, Packing::Plain, 0x00ff_0000), [0xf8, 0]);
        assert_eq!(sent(&short, Packing::Tight, 0x00ff_ffff), [0xff, 0xff]);
        assert!(short.takes_jpeg());
    }

    #[test]
    fn a_mapped_client_is_sent_the_colours_of_its_pixels() {
        let mut wire = wire(8, 8, 0, [0; 3], [0; 3]);
        wire[3] = 0;
        let format = ClientFormat::parse(&wire).unwrap();
        assert!(format.is_mapped() && !format.takes_jpeg());
        let mut map = Vec::new();
        colour_map(&mut map);
        assert_eq!(map.len(), 6 + 256 * 6);
        for (pixel, colour) in [(0, [0; 6]), (0x00ff_ffff, [255; 6])] {
            let index = usize::from(sent(&format, Packing::Plain, pixel)[0]);
            assert_eq!(map[6 + index * 6..][..6], colour);
        }
        let red = usize::from(sent(&format, Packing::Plain, 0x00ff_0000)[0]);
        assert_eq!(map[6 + red * 6..][..6], [255, 255, 0, 0, 0, 0]);
    }
}
