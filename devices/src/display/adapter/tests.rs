use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;

use super::*;
use crate::bus::BusDevice;
use crate::conformance;
use crate::display::PixelFormat;

const SIZE: usize = 1 << 16;
/// The interface's registers in BAR 2.
const XRES: u64 = 0x502;
const YRES: u64 = 0x504;
const BPP: u64 = 0x506;
const ENABLE: u64 = 0x508;
const VIRTUAL_WIDTH: u64 = 0x50c;
const VIRTUAL_HEIGHT: u64 = 0x50e;
const X_OFFSET: u64 = 0x510;
const Y_OFFSET: u64 = 0x512;
const ON: u16 = 0x41;

/// Memory on the heap that counts what it is told.
struct Heap {
    bytes: Mutex<Vec<u8>>,
    clears: AtomicUsize,
    place: Mutex<Option<u64>>,
    tracked: AtomicBool,
}

impl VideoMemory for Heap {
    fn size(&self) -> usize {
        lock(&self.bytes).len()
    }

    fn place(&self, base: Option<u64>) {
        *lock(&self.place) = base;
    }

    fn track(&self, on: bool) {
        self.tracked.store(on, Ordering::Relaxed);
    }

    fn changed(&self, pages: &mut [u64]) {
        pages[0] |= 1 << 3;
    }

    fn read(&self, offset: usize, buffer: &mut [u8]) {
        let bytes = lock(&self.bytes);
        for (to, from) in buffer
            .iter_mut()
            .zip(bytes.get(offset..).unwrap_or_default())
        {
            *to = *from;
        }
    }

    fn write(&self, offset: usize, data: &[u8]) {
        let mut bytes = lock(&self.bytes);
        let to = bytes.get_mut(offset..).unwrap_or_default();
        for (to, from) in to.iter_mut().zip(data) {
            *to = *from;
        }
    }

    fn clear(&self) {
        lock(&self.bytes).fill(0);
        self.clears.fetch_add(1, Ordering::Relaxed);
    }
}

fn heap() -> Arc<Heap> {
    Arc::new(Heap {
        bytes: Mutex::new(vec![0; SIZE]),
        clears: AtomicUsize::new(0),
        place: Mutex::new(None),
        tracked: AtomicBool::new(false),
    })
}

fn adapter() -> (Arc<Adapter>, Arc<Heap>) {
    let memory = heap();
    let adapter = Adapter::new(memory.clone(), 100, 50).unwrap();
    (Arc::new(adapter), memory)
}

fn set(adapter: &Adapter, register: u64, value: u16) {
    adapter.bar_write(REGISTER_BAR, register, &value.to_le_bytes());
}

fn get(adapter: &Adapter, register: u64) -> u16 {
    let mut data = [0xff; 2];
    adapter.bar_read(REGISTER_BAR, register, &mut data);
    u16::from_le_bytes(data)
}

/// Sets a mode as the driver of Linux does.
fn set_mode(adapter: &Adapter, (width, height): (u16, u16), bits: u16) {
    set(adapter, ENABLE, 0);
    set(adapter, BPP, bits);
    set(adapter, XRES, width);
    set(adapter, YRES, height);
    set(adapter, X_OFFSET, 0);
    set(adapter, Y_OFFSET, 0);
    set(adapter, ENABLE, ON);
}

fn shown(adapter: &Adapter) -> Option<(u32, u32, u32, usize, PixelFormat)> {
    adapter.mode().map(|mode| {
        let size = (mode.width(), mode.height(), mode.stride());
        (size.0, size.1, size.2, mode.offset(), mode.format())
    })
}

#[test]
fn a_mode_is_set_at_power_on_and_after_a_reset() {
    let (adapter, memory) = adapter();
    let wanted = Some((100, 50, 400, 0, PixelFormat::Xrgb8888));
    assert_eq!(shown(&adapter), wanted);
    set_mode(&adapter, (64, 64), 16);
    memory.write(0, b"drawn");
    assert_eq!(shown(&adapter), Some((64, 64, 128, 0, PixelFormat::Rgb565)));
    adapter.reset();
    assert_eq!(shown(&adapter), wanted);
    assert_eq!(lock(&memory.bytes)[..5], [0; 5]);
}

#[test]
fn a_driver_finds_the_interface_and_its_limits() {
    let (adapter, _) = adapter();
    assert_eq!(get(&adapter, 0x500), 0xb0c5);
    assert_eq!(get(&adapter, 0x514), 1, "of 64 KiB");
    assert_eq!(get(&adapter, XRES), 100);
    set(&adapter, ENABLE, ON | 2);
    let most = [XRES, YRES, BPP].map(|register| get(&adapter, register));
    assert_eq!(most, [3840, 2160, 32]);
    let mut word = [0xff; 4];
    adapter.bar_read(REGISTER_BAR, 0x600, &mut word);
    assert_eq!(u32::from_le_bytes(word), 8);
    adapter.bar_read(REGISTER_BAR, 0x604, &mut word);
    assert_eq!(u32::from_le_bytes(word), 0x1e1e_1e1e);
}

#[test]
fn setting_a_mode_clears_the_memory_unless_it_is_to_be_kept() {
    let (adapter, memory) = adapter();
    let clears = || memory.clears.load(Ordering::Relaxed);
    set_mode(&adapter, (64, 64), 32);
    assert_eq!(clears(), 1);
    set(&adapter, ENABLE, ON);
    assert_eq!(clears(), 1, "it was on");
    set(&adapter, ENABLE, 0);
    set(&adapter, ENABLE, ON | 0x80);
    assert_eq!(clears(), 1, "to be kept");
}

#[test]
fn the_picture_moves_through_the_memory() {
    let (adapter, _) = adapter();
    set_mode(&adapter, (64, 64), 32);
    set(&adapter, VIRTUAL_WIDTH, 128);
    assert_eq!(get(&adapter, VIRTUAL_HEIGHT), 128);
    set(&adapter, X_OFFSET, 64);
    set(&adapter, Y_OFFSET, 64);
    let wanted = Some((64, 64, 512, 64 * 512 + 256, PixelFormat::Xrgb8888));
    assert_eq!(shown(&adapter), wanted);
    // One line further, and the last would be outside.
    set(&adapter, Y_OFFSET, 65);
    assert_eq!(shown(&adapter), None);
}

#[test]
fn modes_beyond_the_most_that_is_told_turn_the_screen_off() {
    let (adapter, _) = adapter();
    for (most, beyond) in [((3840, 2), (3841, 2)), ((2, 2160), (2, 2161))] {
        set_mode(&adapter, most, 16);
        assert!(adapter.mode().is_some(), "{most:?}");
        set_mode(&adapter, beyond, 16);
        assert_eq!(adapter.mode(), None, "{beyond:?}");
    }
}

#[test]
fn impossible_modes_turn_the_screen_off() {
    let (adapter, _) = adapter();
    let modes = [
        ((0, 0), 32),
        ((65535, 65535), 32),
        ((1, 65535), 32),
        ((64, 64), 8),
        ((64, 64), 0),
        ((64, 64), 255),
    ];
    for (size, bits) in modes {
        set_mode(&adapter, size, bits);
        assert_eq!(adapter.mode(), None, "{size:?} of {bits} bits");
        // Nothing is divided by a line of no bytes.
        get(&adapter, VIRTUAL_HEIGHT);
    }
    set_mode(&adapter, (64, 64), 24);
    assert!(adapter.mode().is_some());
}

#[test]
fn a_blanked_screen_is_off() {
    let (adapter, _) = adapter();
    let blank = |value: u8| {
        adapter.bar_read(REGISTER_BAR, 0x41a, &mut [0]);
        adapter.bar_write(REGISTER_BAR, 0x400, &[value]);
    };
    blank(0);
    assert_eq!(adapter.mode(), None);
    // What follows an index is data.
    adapter.bar_write(REGISTER_BAR, 0x400, &[0x20]);
    assert_eq!(adapter.mode(), None);
    blank(0x20);
    assert!(adapter.mode().is_some());
}

#[test]
fn the_monitor_says_what_it_is() {
    let (adapter, _) = adapter();
    let mut header = [0xff; 8];
    adapter.bar_read(REGISTER_BAR, 0, &mut header);
    assert_eq!(header, [0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    let mut past = [0xff; 4];
    adapter.bar_read(REGISTER_BAR, EDID_LEN as u64, &mut past);
    assert_eq!(past, [0; 4]);
}

#[test]
fn everything_has_changed_where_writes_were_not_recorded() {
    let (adapter, memory) = adapter();
    let source = adapter.source();
    source.track(true);
    assert!(memory.tracked.load(Ordering::Relaxed));
    let changed = || {
        let mut pages = [0];
        source.changed(&mut pages);
        pages[0]
    };
    assert_eq!(changed(), u64::MAX, "before it was tracked");
    assert_eq!(changed(), 1 << 3);
    adapter.bar_write(MEMORY_BAR, 0, b"byte by byte");
    assert_eq!(changed(), u64::MAX);
    adapter.bar_mapped(MEMORY_BAR, None);
    assert_eq!((changed(), *lock(&memory.place)), (u64::MAX, None));
    adapter.bar_mapped(MEMORY_BAR, Some(0xc000_0000));
    assert_eq!(*lock(&memory.place), Some(0xc000_0000));
    changed();
    set_mode(&adapter, (10, 10), 32);
    assert_eq!(changed(), u64::MAX);
    drop(source);
    assert!(!memory.tracked.load(Ordering::Relaxed));
}

/// Both BARs as one device of a bus: registers, then memory.
struct Flat(Arc<Adapter>);

impl BusDevice for Flat {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(REGISTERS_LEN) {
            Some(offset) => self.0.bar_read(MEMORY_BAR, offset, data),
            None => self.0.bar_read(REGISTER_BAR, offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset.checked_sub(REGISTERS_LEN) {
            Some(offset) => self.0.bar_write(MEMORY_BAR, offset, data),
            None => self.0.bar_write(REGISTER_BAR, offset, data),
        }
    }
}

impl Unit for Flat {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn start(&self) -> Result<(), StartError> {
        self.0.start()
    }

    fn stop(&self, deadline: Instant) -> Result<(), StopError> {
        self.0.stop(deadline)
    }

    fn reset(&self) {
        self.0.reset();
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        self.0.save()
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        self.0.restore(set)
    }
}

#[test]
fn it_bears_every_access_and_every_state() {
    conformance::check(REGISTERS_LEN + 64, || Flat(adapter().0));
}

#[test]
fn the_picture_is_saved_with_the_registers() {
    let (original, memory) = adapter();
    set_mode(&original, (64, 64), 32);
    memory.write(SIZE - 3, b"end");
    let mut set = SectionSet::default();
    let saved = original.save().unwrap();
    saved.into_iter().for_each(|section| set.push(section));
    let (copy, copied) = adapter();
    copied.write(0, b"of another picture");
    copy.restore(&mut set).unwrap();
    assert_eq!(copy.mode(), original.mode());
    assert_eq!(*lock(&copied.bytes), *lock(&memory.bytes));
}

#[test]
fn pages_that_do_not_exist_are_refused() {
    let (adapter, _) = adapter();
    let refused = |pages| {
        let mut set = SectionSet::default();
        set.push(adapter.save().unwrap().remove(0));
        set.push(Section::encode(MEMORY_NAME, &VideoMemoryV1 { pages }).unwrap());
        matches!(adapter.restore(&mut set), Err(RestoreError::Invalid { .. }))
    };
    assert!(!refused(vec![(15, vec![1; PAGE])]));
    assert!(refused(vec![(16, vec![1; PAGE])]));
    assert!(refused(vec![(u32::MAX, vec![1; PAGE])]));
    assert!(refused(vec![(0, vec![1; PAGE - 1])]));
}

proptest! {
    #[test]
    fn every_mode_lies_in_its_memory(values in proptest::collection::vec(any::<u16>(), 9)) {
        let (adapter, _) = adapter();
        for (register, value) in (XRES..).step_by(2).zip(values) {
            // Small values too, or nothing fits.
            set(&adapter, register, if value & 1 == 0 { value } else { value >> 9 });
        }
        set(&adapter, ENABLE, ON | 0x80);
        if let Some(mode) = adapter.mode() {
            let lines = (mode.height() - 1) as usize * mode.stride() as usize;
            let line = (mode.width() * mode.format().bytes()) as usize;
            prop_assert!(mode.offset() + lines + line <= SIZE);
        }
    }
}
