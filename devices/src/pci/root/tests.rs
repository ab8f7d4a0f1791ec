use super::*;
use crate::pci::BarKind;
use proptest::prelude::*;
use std::collections::HashMap;

const WINDOWS: Windows = Windows {
    low: 0xc000_0000..0xe000_0000,
    high: 0x10_0000_0000..0x20_0000_0000,
};

struct Probe {
    config: Mutex<ConfigSpace>,
    id: u8,
    mapped: Mutex<HashMap<u8, u64>>,
    written: Mutex<Vec<(u8, u64, usize)>>,
}

impl Probe {
    fn new(id: u8, bars: &[(u8, BarKind, u64)]) -> Arc<Self> {
        let mut config = ConfigSpace::new(&FunctionId {
            vendor: 0x1234,
            device: id.into(),
            ..FunctionId::default()
        });
        for (index, kind, size) in bars {
            config.add_bar(*index, *kind, *size).unwrap();
        }
        Arc::new(Self {
            config: Mutex::new(config),
            id,
            mapped: Mutex::default(),
            written: Mutex::default(),
        })
    }

    fn base(&self, bar: u8) -> Option<u64> {
        self.mapped.lock().unwrap().get(&bar).copied()
    }
}

impl PciFunction for Probe {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(self.id);
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.written.lock().unwrap().push((bar, offset, data.len()));
    }

    fn bar_mapped(&self, bar: u8, base: Option<u64>) {
        let mut mapped = self.mapped.lock().unwrap();
        match base {
            Some(base) => assert_eq!(mapped.insert(bar, base), None, "mapped twice"),
            None => assert!(mapped.remove(&bar).is_some(), "unmapped twice"),
        }
    }
}

fn small(id: u8) -> Arc<Probe> {
    Probe::new(id, &[(0, BarKind::Memory32, 0x1000)])
}

fn read32(device: &dyn BusDevice, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    device.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn at(slot: u8, register: u64) -> u64 {
    u64::from(slot) << 15 | register
}

/// What answers at a guest-physical address.
fn answer(root: &Arc<PciRoot>, address: u64) -> u8 {
    let mut data = [0xff];
    for (window, device) in root.windows() {
        if window.contains(&address) {
            device.read(address - window.start, &mut data);
        }
    }
    data[0]
}

#[test]
fn both_mechanisms_reach_the_same_registers() {
    let root = PciRoot::new(WINDOWS);
    root.add(small(7), Some(3)).unwrap();
    let (ports, ecam) = (root.ports(None), root.ecam());
    assert_eq!(read32(&*ecam, at(0, 0)), 0x0d57_8086);
    assert_eq!(read32(&*ecam, at(3, 0)), 0x0007_1234);
    ports.write(0, &0x8000_1800_u32.to_le_bytes());
    assert_eq!(read32(&*ports, 0), 0x8000_1800);
    assert_eq!(read32(&*ports, 4), 0x0007_1234);
    let mut half = [0; 2];
    ports.read(6, &mut half);
    assert_eq!(half, [7, 0]);
    let mut all = [0; 8];
    ecam.read(at(3, 0), &mut all);
    assert_eq!(all, [0x34, 0x12, 7, 0, 2, 0, 0, 0]);
}

#[test]
fn what_is_not_there_reads_as_ones() {
    let root = PciRoot::new(WINDOWS);
    root.add(small(7), Some(3)).unwrap();
    let (ports, ecam) = (root.ports(None), root.ecam());
    assert_eq!(read32(&*ecam, at(4, 0)), u32::MAX);
    assert_eq!(read32(&*ecam, at(3, 0x1000)), u32::MAX);
    assert_eq!(read32(&*ecam, at(3, 0x100)), 0);
    // Disabled, another bus, another function.
    for address in [0x1800_u32, 0x8001_1800, 0x8000_1900] {
        ports.write(0, &address.to_le_bytes());
        assert_eq!(read32(&*ports, 4), u32::MAX, "{address:#x}");
        ports.write(4, &[0; 4]);
    }
    let mut byte = [0xff];
    ports.read(1, &mut byte);
    assert_eq!(byte, [0xff]);
    // Only a 32-bit write reaches the address register.
    ports.write(0, &0x8000_1800_u32.to_le_bytes());
    ports.write(0, &[0; 2]);
    ports.write(2, &[0; 2]);
    assert_eq!(read32(&*ports, 0), 0x8000_1800);
}

#[test]
fn bytes_to_the_reset_port_go_to_its_handler() {
    #[derive(Default)]
    struct Reset(Mutex<Vec<u8>>);
    impl BusDevice for Reset {
        fn read(&self, offset: u64, data: &mut [u8]) {
            assert_eq!(offset, 0);
            data.fill(0x5a);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            assert_eq!(offset, 0);
            self.0.lock().unwrap().extend_from_slice(data);
        }
    }
    let reset = Arc::new(Reset::default());
    let ports = PciRoot::new(WINDOWS).ports(Some(reset.clone()));
    ports.write(1, &[6]);
    ports.write(1, &[1, 2]);
    ports.write(0, &[3]);
    ports.write(0, &[0xfc, 0xff, 0xff, 0xff]);
    let mut byte = [0];
    ports.read(1, &mut byte);
    assert_eq!((byte, &*reset.0.lock().unwrap()), ([0x5a], &vec![6]));
    assert_eq!(read32(&*ports, 0), 0x80ff_fffc);
}

#[test]
fn slots_are_stable_and_not_reused_while_fresh_ones_are_left() {
    let root = PciRoot::new(WINDOWS);
    let add = |slot| root.add(small(1), slot).map(PciAddress::slot);
    assert_eq!(add(None), Ok(1));
    assert_eq!(add(Some(2)), Ok(2));
    assert_eq!(add(Some(2)), Err(PciError::Occupied { slot: 2 }));
    for slot in [0, 32, 255] {
        assert_eq!(add(Some(slot)), Err(PciError::NoSuchSlot { slot }));
    }
    assert!(root.remove(PciAddress(1)).is_some());
    assert!(root.remove(PciAddress(1)).is_none());
    assert!(root.remove(PciAddress(0)).is_none());
    for slot in 3..32 {
        assert_eq!(add(None), Ok(slot));
    }
    assert_eq!(add(None), Ok(1));
    assert_eq!(add(None), Err(PciError::Full));
    assert_eq!(PciAddress::new(31).unwrap().to_string(), "0000:00:1f.0");
    assert_eq!(PciAddress::new(32), None);
}

#[test]
fn bars_are_placed_apart_and_decode_before_the_guest_runs() {
    let root = PciRoot::new(WINDOWS);
    let probe = Probe::new(
        1,
        &[
            (0, BarKind::Memory64, 0x10000),
            (2, BarKind::Memory32, 0x4000),
        ],
    );
    let other = small(2);
    root.add(probe.clone(), None).unwrap();
    root.add(other.clone(), None).unwrap();
    assert_eq!(probe.base(0), Some(0x10_0000_0000));
    assert_eq!(probe.base(2), Some(0xc000_0000));
    assert_eq!(other.base(0), Some(0xc000_4000));
    assert_eq!(answer(&root, 0x10_0000_ffff), 1);
    assert_eq!(answer(&root, 0x10_0001_0000), 0xff);
    assert_eq!(answer(&root, 0xc000_4000), 2);
    let (window, device) = root.windows().remove(0);
    assert_eq!(window, WINDOWS.low);
    device.write(0x10, &[0; 8]);
    device.write(0x3ffc, &[0; 8]);
    assert_eq!(*probe.written.lock().unwrap(), [(2, 0x10, 8)]);
    let huge = Probe::new(3, &[(0, BarKind::Memory32, 1 << 30)]);
    assert_eq!(
        root.add(huge, Some(9)),
        Err(PciError::NoRoom {
            slot: 9,
            size: 1 << 30
        })
    );
    root.remove(PciAddress(1)).unwrap();
    assert_eq!((probe.base(0), probe.base(2)), (None, None));
    assert_eq!(answer(&root, 0x10_0000_0000), 0xff);
}

#[test]
fn a_bar_follows_the_guest_and_stops_outside_the_windows() {
    let root = PciRoot::new(WINDOWS);
    let (a, b) = (small(1), small(2));
    root.add(a.clone(), Some(1)).unwrap();
    root.add(b.clone(), Some(2)).unwrap();
    let ecam = root.ecam();
    let put = |slot, base: u32| ecam.write(at(slot, 0x10), &base.to_le_bytes());
    put(2, 0xc800_0000);
    assert_eq!(b.base(0), Some(0xc800_0000));
    assert_eq!(answer(&root, 0xc800_0000), 2);
    // RAM, ECAM, the interrupt controllers, and the sizing pattern.
    for base in [0, 0x10_0000, 0xe000_0000, 0xfee0_0000, u32::MAX] {
        put(2, base);
        assert_eq!(b.base(0), None, "{base:#x} decodes");
    }
    // On top of another: the lower slot wins, whoever came first.
    put(2, 0xd000_0000);
    put(1, 0xd000_0000);
    assert_eq!((a.base(0), b.base(0)), (Some(0xd000_0000), None));
    put(1, 0xd000_1000);
    assert_eq!(
        (a.base(0), b.base(0)),
        (Some(0xd000_1000), Some(0xd000_0000))
    );
    ecam.write(at(1, 4), &[0]);
    assert_eq!((a.base(0), answer(&root, 0xd000_1000)), (None, 0xff));
    ecam.write(at(1, 4), &[2]);
    assert_eq!(a.base(0), Some(0xd000_1000));
}

#[test]
fn a_new_function_keeps_clear_of_what_moved_and_of_where_it_will_return() {
    let root = PciRoot::new(WINDOWS);
    let a = small(1);
    root.add(a.clone(), None).unwrap();
    root.ecam()
        .write(at(1, 0x10), &0xc000_1000_u32.to_le_bytes());
    let b = small(2);
    root.add(b.clone(), None).unwrap();
    assert_eq!(b.base(0), Some(0xc000_2000));
    a.config.lock().unwrap().reset();
    root.reset();
    assert_eq!(a.base(0), Some(0xc000_0000));
}

#[test]
fn the_root_survives_a_round_trip() {
    let root = PciRoot::new(WINDOWS);
    root.add(small(1), Some(5)).unwrap();
    root.remove(PciAddress(5)).unwrap();
    root.ports(None).write(0, &0x8000_0804_u32.to_le_bytes());
    root.ecam().write(at(0, 4), &[6]);
    let save = |root: &PciRoot| {
        let mut set = SectionSet::default();
        for section in root.save().unwrap() {
            set.push(section);
        }
        set
    };
    let other = PciRoot::new(WINDOWS);
    other.restore(&mut save(&root)).unwrap();
    assert_eq!(save(&other), save(&root));
    for slot in (1..5).chain(6..8) {
        assert_eq!(other.add(small(1), None).unwrap().slot(), slot);
    }
    let mut bad = SectionSet::default();
    let state = PciRootV1 {
        address: 1,
        used_slots: 0,
        bridge: lock(&root.bridge.0).save(),
    };
    bad.push(Section::encode("pci", &state).unwrap());
    assert!(matches!(
        other.restore(&mut bad),
        Err(RestoreError::Invalid { .. })
    ));
    other.reset();
    assert_eq!(read32(&*other.ports(None), 0), 0);
}

proptest! {
    #[test]
    fn hostile_programming_never_leaves_a_window_or_overlaps(
        writes in prop::collection::vec((0_u8..4, 0_u64..0x40, any::<u64>(), 1_usize..9), 0..60)
    ) {
        let root = PciRoot::new(WINDOWS);
        let probes: Vec<_> = (1..4)
            .map(|id| Probe::new(id, &[
                (0, BarKind::Memory64, 0x10_0000),
                (3, BarKind::Memory32, 0x100_0000),
            ]))
            .collect();
        for probe in &probes {
            root.add(probe.clone(), None).unwrap();
        }
        let ecam = root.ecam();
        for (slot, register, value, len) in writes {
            ecam.write(at(slot, register), &value.to_le_bytes()[..len]);
            ecam.write(at(slot, 4), &[2]);
            let mut spans: Vec<_> = probes
                .iter()
                .flat_map(|p| p.mapped.lock().unwrap().clone())
                .map(|(bar, base)| (base, base + if bar == 0 { 0x10_0000 } else { 0x100_0000 }))
                .collect();
            spans.sort_unstable();
            for (start, end) in &spans {
                prop_assert!(WINDOWS.all().iter().any(|w| w.start <= *start && *end <= w.end));
            }
            for pair in spans.windows(2) {
                prop_assert!(pair[0].1 <= pair[1].0);
            }
        }
    }
}
