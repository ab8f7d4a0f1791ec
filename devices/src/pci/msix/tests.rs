use super::*;
use proptest::prelude::*;
use std::sync::atomic::AtomicU32;

#[derive(Default)]
struct Probe {
    routed: Mutex<Vec<Option<MsiMessage>>>,
    signals: AtomicU32,
    refuse: AtomicBool,
    /// What [`MsiVector::hold`] was told.
    holds: Mutex<Vec<bool>>,
    waiting: AtomicBool,
}

impl Probe {
    fn signals(&self) -> u32 {
        self.signals.swap(0, Ordering::SeqCst)
    }

    fn routes(&self) -> Vec<Option<MsiMessage>> {
        std::mem::take(&mut self.routed.lock().unwrap())
    }
}

impl MsiVector for Probe {
    fn signal(&self) {
        self.signals.fetch_add(1, Ordering::SeqCst);
    }

    fn route(&self, message: Option<MsiMessage>) -> Result<(), MsiError> {
        if self.refuse.load(Ordering::SeqCst) && message.is_some() {
            return Err(MsiError::Host(std::io::Error::other("refused")));
        }
        self.routed.lock().unwrap().push(message);
        Ok(())
    }

    fn trigger(&self) -> Result<Option<OwnedFd>, MsiError> {
        let null = std::fs::File::open("/dev/null").map_err(MsiError::Host)?;
        Ok(Some(null.into()))
    }

    fn hold(&self, held: bool) -> Result<(), MsiError> {
        self.holds.lock().unwrap().push(held);
        Ok(())
    }

    fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::SeqCst)
    }
}

#[derive(Default)]
struct Probes(Mutex<Vec<Arc<Probe>>>);

impl Probes {
    fn get(&self, index: usize) -> Arc<Probe> {
        self.0.lock().unwrap()[index].clone()
    }
}

impl MsiAllocator for Probes {
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiVector>>, MsiError> {
        let made: Vec<_> = (0..count).map(|_| Arc::new(Probe::default())).collect();
        self.0.lock().unwrap().extend(made.iter().cloned());
        Ok(made.into_iter().map(|p| p as Arc<dyn MsiVector>).collect())
    }
}

const ENABLE: u16 = CONTROL_ENABLE;
const MASK: u16 = CONTROL_MASK_ALL;

fn sample(count: u16) -> (Msix, Probes) {
    let probes = Probes::default();
    (Msix::new(&probes, count).unwrap(), probes)
}

fn program(msix: &Msix, vector: u64, address: u64, data: u32, control: u32) {
    let at = vector * ENTRY_SIZE;
    msix.table_write(at, &address.to_le_bytes());
    msix.table_write(at + 8, &data.to_le_bytes());
    msix.table_write(at + 12, &control.to_le_bytes());
}

fn word(msix: &Msix, offset: u64) -> u32 {
    let mut data = [0; 4];
    msix.table_read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn pending(msix: &Msix, offset: u64) -> u64 {
    let mut data = [0xaa; 8];
    msix.pba_read(offset, &mut data);
    u64::from_le_bytes(data)
}

#[test]
fn an_entry_is_routed_once_it_is_unmasked_and_the_function_enabled() {
    let (msix, probes) = sample(2);
    program(&msix, 1, 0xfee0_1000, 0x41, 0);
    let probe = probes.get(1);
    assert_eq!(probe.routes(), []);
    msix.set_control(ENABLE | MASK);
    assert_eq!(probe.routes(), []);
    msix.set_control(ENABLE);
    let message = MsiMessage {
        address: 0xfee0_1000,
        data: 0x41,
    };
    assert_eq!(probe.routes(), [Some(message)]);
    msix.signal(1);
    msix.signal(0);
    assert_eq!((probe.signals(), probes.get(0).signals()), (1, 0));
    msix.set_control(0);
    assert_eq!(probe.routes(), [None]);
    msix.signal(1);
    assert_eq!(probe.signals(), 0);
}

#[test]
fn a_masked_signal_is_pending_and_sent_on_unmask() {
    let (msix, probes) = sample(70);
    for vector in [0, 69] {
        program(&msix, vector, 0xfee0_0000, 0x30, 1);
    }
    msix.set_control(ENABLE);
    msix.signal(0);
    msix.signal(69);
    assert_eq!((pending(&msix, 0), pending(&msix, 8)), (1, 1 << 5));
    program(&msix, 69, 0xfee0_0000, 0x31, 0);
    assert_eq!((pending(&msix, 0), pending(&msix, 8)), (1, 0));
    assert_eq!((probes.get(69).signals(), probes.get(0).signals()), (1, 0));
    msix.set_control(ENABLE | MASK);
    msix.signal(69);
    assert_eq!(probes.get(69).signals(), 0);
    msix.set_control(ENABLE);
    assert_eq!(probes.get(69).signals(), 1);
}

#[test]
fn what_others_signal_is_held_back_while_the_entry_is_not_open() {
    let (msix, probes) = sample(2);
    let holds = || std::mem::take(&mut *probes.get(1).holds.lock().unwrap());
    assert!(msix.trigger(2).unwrap().is_none());
    program(&msix, 1, 0xfee0_1000, 0x41, 0);
    msix.set_control(ENABLE);
    assert!(holds().is_empty(), "nobody else signals it yet");
    assert!(msix.trigger(1).unwrap().is_some());
    assert!(holds().is_empty(), "it is open");
    msix.table_write(ENTRY_SIZE + 12, &1_u32.to_le_bytes());
    msix.set_control(ENABLE | MASK);
    assert_eq!(holds(), [true]);
    assert_eq!(
        (pending(&msix, 0), msix.save().entries[1].pending),
        (0, false)
    );
    probes.get(1).waiting.store(true, Ordering::SeqCst);
    assert_eq!(
        (pending(&msix, 0), msix.save().entries[1].pending),
        (2, true)
    );
    msix.table_write(ENTRY_SIZE + 12, &0_u32.to_le_bytes());
    assert!(holds().is_empty());
    msix.set_control(ENABLE);
    assert_eq!(holds(), [false]);
    assert_eq!(pending(&msix, 0), 0);
    msix.set_control(0);
    assert_eq!(holds(), [true]);
    msix.reset();
    assert_eq!(holds(), [false]);
    program(&msix, 1, 0xfee0_1000, 0x41, 0);
    msix.set_control(ENABLE);
    msix.set_control(0);
    assert!(holds().is_empty(), "it is forgotten");
    assert!(msix.trigger(1).unwrap().is_some());
    assert_eq!(holds(), [true], "it begins held back");
}

#[test]
fn masking_and_unmasking_without_a_change_does_not_reroute() {
    let (msix, probes) = sample(1);
    program(&msix, 0, 0xfee0_0000, 0x30, 0);
    msix.set_control(ENABLE);
    assert_eq!(probes.get(0).routes().len(), 1);
    for control in [1_u32, 0, 1, 0] {
        msix.table_write(12, &control.to_le_bytes());
    }
    assert_eq!(probes.get(0).routes(), []);
}

#[test]
fn a_refused_route_keeps_the_signal_pending() {
    let (msix, probes) = sample(1);
    let probe = probes.get(0);
    probe.refuse.store(true, Ordering::SeqCst);
    program(&msix, 0, 0xfee0_0000, 0x30, 0);
    msix.set_control(ENABLE);
    msix.signal(0);
    assert_eq!((probe.signals(), pending(&msix, 0)), (0, 1));
    probe.refuse.store(false, Ordering::SeqCst);
    msix.table_write(12, &0_u32.to_le_bytes());
    assert_eq!((probe.signals(), pending(&msix, 0)), (1, 0));
}

#[test]
fn odd_accesses_and_vectors_out_of_range_do_nothing() {
    let (msix, _probes) = sample(1);
    program(&msix, 0, 0x1122_3344_5566_7788, 0x99, 0);
    for (offset, len) in [(0, 1), (0, 2), (2, 4), (4, 8), (16, 4), (u64::MAX - 3, 4)] {
        msix.table_write(offset, &vec![0; len]);
        let mut data = vec![0; len];
        msix.table_read(offset, &mut data);
        assert!(data.iter().all(|b| *b == 0xff), "{offset:#x}/{len}");
        msix.pba_read(offset | 8, &mut data);
    }
    assert_eq!(
        [0, 4, 8, 12].map(|at| word(&msix, at)),
        [0x5566_7788, 0x1122_3344, 0x99, 0]
    );
    msix.signal(1);
    msix.signal(u16::MAX);
    assert!(Msix::new(&Probes::default(), 0).is_err());
    assert!(Msix::new(&Probes::default(), MAX_VECTORS + 1).is_err());
}

#[test]
fn saved_entries_come_back_with_their_routes_and_pending_bits() {
    let (msix, _) = sample(2);
    program(&msix, 0, 0xfee0_2000, 0x51, 0);
    program(&msix, 1, 0xfee0_3000, 0x52, 1);
    msix.set_control(ENABLE);
    msix.signal(1);
    let (other, probes) = sample(2);
    other.restore("test", msix.save(), ENABLE).unwrap();
    assert_eq!(other.save(), msix.save());
    other.signal(0);
    assert_eq!((probes.get(0).signals(), probes.get(1).signals()), (1, 0));
    other.table_write(28, &0_u32.to_le_bytes());
    assert_eq!(probes.get(1).signals(), 1);
    let (short, _) = sample(1);
    assert!(matches!(
        short.restore("test", msix.save(), ENABLE),
        Err(RestoreError::Invalid { .. })
    ));
}

#[test]
fn signals_from_many_threads_are_never_lost_while_masks_change() {
    let (msix, probes) = sample(1);
    program(&msix, 0, 0xfee0_0000, 0x30, 0);
    msix.set_control(ENABLE);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..2000).for_each(|_| msix.signal(0)));
        }
        for i in 0..2000_u32 {
            msix.table_write(12, &(i & 1).to_le_bytes());
        }
    });
    probes.get(0).signals();
    msix.table_write(12, &1_u32.to_le_bytes());
    msix.signal(0);
    assert_eq!(probes.get(0).signals(), 0);
    msix.table_write(12, &0_u32.to_le_bytes());
    assert_eq!((probes.get(0).signals(), pending(&msix, 0)), (1, 0));
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_panics(
        steps in prop::collection::vec((any::<u8>(), any::<u64>(), any::<u64>(), 0_usize..9), 0..40)
    ) {
        let (msix, _probes) = sample(3);
        for (kind, offset, value, len) in steps {
            let offset = if kind & 0x80 == 0 { offset % 64 } else { offset };
            let mut data = value.to_le_bytes();
            match kind % 5 {
                0 => msix.table_write(offset, &data[..len]),
                1 => msix.table_read(offset, &mut data[..len]),
                2 => msix.pba_read(offset, &mut data[..len]),
                3 => msix.set_control(u16::try_from(value & 0xffff).unwrap()),
                _ => msix.signal(u16::try_from(value % 5).unwrap()),
            }
        }
    }
}
