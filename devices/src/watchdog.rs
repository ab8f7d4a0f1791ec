//! The watchdog of Intel's 6300ESB: a PCI function that restarts a system whose
//! software has stopped to feed it.
//!
//! # Contract
//!
//! Two stages of a timer. When the first runs out, the second begins, by which a driver may be
//! interrupted; here it never is, as the function has no interrupt pin. When the second runs out
//! too, the machine is asked for [`GuestRequest::Watchdog`], and the function is as after
//! power-on but for the flag that tells of it, which stays over resets until the guest clears it.
//! What is done then is the machine's business.
//!
//! The timer counts while the machine runs. It stands while that is paused, and goes on with
//! what was left.
//!
//! # Mechanism
//!
//! Nothing counts: a deadline is kept, and a [`WakeTimer`] armed with it. The machine calls
//! [`Watchdog::tick`] when that has fired.
//!
//! Follows the data sheet of the Intel 6300ESB I/O Controller Hub, chapter 15, and what Linux's
//! i6300esb driver does.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration::{RestoreError, SaveError, SavedState, Section, SectionSet};
use serde::{Deserialize, Serialize};

use crate::pci::{BarKind, ConfigError, ConfigSpace, ConfigSpaceV1, FunctionId, PciFunction};
use crate::time::{Clock, WakeTimer};
use crate::{GuestRequest, GuestRequests, StartError, StopError, Unit};

const NAME: &str = "watchdog";
/// The registers take 16 bytes; a base address register has a page at least.
const BAR_LEN: u64 = 4096;

/// Registers in configuration space: WDT configuration (16 bits) and WDT lock (8 bits).
const CONFIG: u16 = 0x60;
const LOCK: u16 = 0x68;
const CONFIG_INTERRUPT: u16 = 0b11;
const CONFIG_MICROSECONDS: u16 = 1 << 2;
const CONFIG_OUTPUT_OFF: u16 = 1 << 5;
const CONFIG_BITS: u16 = CONFIG_INTERRUPT | CONFIG_MICROSECONDS | CONFIG_OUTPUT_OFF;
const LOCK_LOCKED: u8 = 1 << 0;
const LOCK_ENABLE: u8 = 1 << 1;
const LOCK_FREE_RUNNING: u8 = 1 << 2;
const LOCK_BITS: u8 = LOCK_LOCKED | LOCK_ENABLE | LOCK_FREE_RUNNING;

/// Registers in memory: the preload values of both stages, interrupt status, reload.
const PRELOAD: [u64; 2] = [0x00, 0x04];
const STATUS: u64 = 0x08;
const RELOAD: u64 = 0x0c;
const PRELOAD_BITS: u32 = 0xf_ffff;
const STATUS_FIRST_STAGE: u32 = 1 << 0;
const RELOAD_RELOAD: u16 = 1 << 8;
const RELOAD_TIMEOUT: u16 = 1 << 9;
/// Written one after the other to [`RELOAD`], they unlock the registers for one write.
const UNLOCK: [u16; 2] = [0x80, 0x86];

/// The timer counts the PCI clock's ticks, of 30 ns each.
const TICK: u64 = 30;
/// A unit of a preload value in ticks, as powers of two: about 1 ms or 1 µs.
const MILLISECONDS_SHIFT: u32 = 15;
const MICROSECONDS_SHIFT: u32 = 5;

/// The shortest stage. A guest's value must not keep the control thread busy.
const SHORTEST: Duration = Duration::from_millis(1);

/// The stages of the timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StageV1 {
    /// Until the interrupt.
    First,
    /// Until the restart.
    Second,
}

/// The saved form of a [`Watchdog`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogV1 {
    /// The WDT configuration register.
    pub config: u16,
    /// The WDT lock register.
    pub lock: u8,
    /// The preload values of both stages.
    pub preload: [u32; 2],
    /// The interrupt status register.
    pub status: u32,
    /// Whether it has run out since the guest asked last.
    pub timed_out: bool,
    /// How much of the unlocking sequence was written.
    pub unlocked: u8,
    /// The stage that counts and what is left of it, in nanoseconds; `None` while it stands still.
    pub left: Option<(StageV1, u64)>,
    /// The configuration space.
    pub space: ConfigSpaceV1,
}

impl SavedState for WatchdogV1 {
    const SCHEMA: &'static str = "i6300esb";
    const VERSION: u16 = 1;
}

/// What counts: until `end` by the clock while the machine runs, with `left` to go while it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Count {
    Running { stage: StageV1, end: Duration },
    Held { stage: StageV1, left: Duration },
}

/// The registers, as a function of what time it is.
#[derive(Debug)]
struct Registers {
    config: u16,
    lock: u8,
    preload: [u32; 2],
    status: u32,
    timed_out: bool,
    unlocked: u8,
    count: Option<Count>,
    /// The machine runs.
    running: bool,
}

impl Registers {
    fn new() -> Self {
        Self {
            config: 0,
            lock: 0,
            preload: [PRELOAD_BITS; 2],
            status: 0,
            timed_out: false,
            unlocked: 0,
            count: None,
            running: false,
        }
    }

    fn reset(&mut self) {
        let Self {
            timed_out, running, ..
        } = *self;
        *self = Self {
            timed_out,
            running,
            ..Self::new()
        };
    }

    fn period(&self, stage: StageV1) -> Duration {
        let [first, second] = self.preload;
        let value = match stage {
            StageV1::First => first,
            StageV1::Second => second,
        };
        let shift = if self.config & CONFIG_MICROSECONDS == 0 {
            MILLISECONDS_SHIFT
        } else {
            MICROSECONDS_SHIFT
        };
        let ticks = u64::from(value & PRELOAD_BITS) << shift;
        Duration::from_nanos(ticks.saturating_mul(TICK)).max(SHORTEST)
    }

    /// Begins a stage that ends its period after `from`.
    fn begin(&mut self, stage: StageV1, from: Duration) {
        let left = self.period(stage);
        self.count = Some(if self.running {
            let end = from.saturating_add(left);
            Count::Running { stage, end }
        } else {
            Count::Held { stage, left }
        });
    }

    fn start(&mut self, now: Duration) {
        self.running = true;
        if let Some(Count::Held { stage, left }) = self.count {
            let end = now.saturating_add(left);
            self.count = Some(Count::Running { stage, end });
        }
    }

    fn stop(&mut self, now: Duration) {
        self.running = false;
        if let Some(Count::Running { stage, end }) = self.count {
            let left = end.saturating_sub(now);
            self.count = Some(Count::Held { stage, left });
        }
    }

    fn deadline(&self) -> Option<Duration> {
        match self.count {
            Some(Count::Running { end, .. }) => Some(end),
            _ => None,
        }
    }

    /// Does what has become due; whether the machine is to be asked.
    fn tick(&mut self, now: Duration) -> bool {
        let Some(Count::Running { stage, end }) = self.count else {
            return false;
        };
        if end > now {
            return false;
        }
        let free = self.lock & LOCK_FREE_RUNNING != 0;
        if stage == StageV1::First {
            if self.config & CONFIG_INTERRUPT == 0 {
                self.status |= STATUS_FIRST_STAGE;
            }
            let next = if free {
                StageV1::First
            } else {
                StageV1::Second
            };
            self.begin(next, now);
            return false;
        }
        self.timed_out = true;
        if self.config & CONFIG_OUTPUT_OFF == 0 {
            self.reset();
            return true;
        }
        self.begin(StageV1::First, now);
        false
    }

    fn write_lock(&mut self, value: u8, now: Duration) {
        if self.lock & LOCK_LOCKED != 0 {
            return;
        }
        let was = self.lock & LOCK_ENABLE != 0;
        self.lock = value & LOCK_BITS;
        match (was, self.lock & LOCK_ENABLE != 0) {
            (false, true) => self.begin(StageV1::First, now),
            (_, false) => self.count = None,
            (true, true) => (),
        }
    }

    /// The 16 bytes of registers in memory.
    fn image(&self) -> [u8; 16] {
        let reload = if self.timed_out { RELOAD_TIMEOUT } else { 0 };
        let words = [
            self.preload[0],
            self.preload[1],
            self.status,
            u32::from(reload),
        ];
        let mut image = [0; 16];
        for (bytes, word) in image.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        image
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let image = self.image();
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = image.get(at..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = *from;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], now: Duration) {
        let mut word = [0; 4];
        for (to, from) in word.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(word);
        let low = u16::from_le_bytes([word[0], word[1]]);
        let [first, second] = PRELOAD;
        match offset {
            STATUS => self.status &= !value,
            RELOAD if self.unlocked == 0 && low == UNLOCK[0] => self.unlocked = 1,
            RELOAD if self.unlocked == 1 && low == UNLOCK[1] => self.unlocked = 2,
            RELOAD if self.unlocked == 2 => {
                self.unlocked = 0;
                self.timed_out &= low & RELOAD_TIMEOUT == 0;
                if low & RELOAD_RELOAD != 0 && self.lock & LOCK_ENABLE != 0 {
                    self.begin(StageV1::First, now);
                }
            }
            _ if (offset == first || offset == second) && self.unlocked == 2 && data.len() >= 4 => {
                self.unlocked = 0;
                self.preload[usize::from(offset == second)] = value & PRELOAD_BITS;
            }
            // What is out of turn begins the sequence anew.
            _ => self.unlocked = 0,
        }
    }

    fn save(&self, now: Duration, space: ConfigSpaceV1) -> WatchdogV1 {
        let Self {
            config,
            lock,
            preload,
            status,
            timed_out,
            unlocked,
            count,
            running: _,
        } = *self;
        let left = count.map(|count| match count {
            Count::Running { stage, end } => (stage, end.saturating_sub(now)),
            Count::Held { stage, left } => (stage, left),
        });
        WatchdogV1 {
            config,
            lock,
            preload,
            status,
            timed_out,
            unlocked,
            left: left.map(|(stage, left)| (stage, nanoseconds(left))),
            space,
        }
    }

    /// Adopts untrusted registers; the configuration space was taken by its owner.
    fn restore(&mut self, state: &WatchdogV1) -> Result<(), RestoreError> {
        let invalid = |reason: String| RestoreError::Invalid {
            schema: WatchdogV1::SCHEMA,
            reason,
        };
        let &WatchdogV1 {
            config,
            lock,
            preload,
            status,
            timed_out,
            unlocked,
            left,
            space: _,
        } = state;
        if config & !CONFIG_BITS != 0
            || lock & !LOCK_BITS != 0
            || preload.iter().any(|value| value & !PRELOAD_BITS != 0)
            || status & !STATUS_FIRST_STAGE != 0
            || unlocked > 2
        {
            return Err(invalid("a register has reserved bits set".to_owned()));
        }
        if left.is_some() != (lock & LOCK_ENABLE != 0) {
            return Err(invalid("it counts and is off, or the reverse".to_owned()));
        }
        let most = u64::from(PRELOAD_BITS) << MILLISECONDS_SHIFT;
        let most = most.saturating_mul(TICK);
        if let Some((_, left)) = left.filter(|(_, left)| *left > most) {
            return Err(invalid(format!("{left} ns are left of at most {most}")));
        }
        *self = Self {
            config,
            lock,
            preload,
            status,
            timed_out,
            unlocked,
            count: left.map(|(stage, left)| Count::Held {
                stage,
                left: Duration::from_nanos(left),
            }),
            running: false,
        };
        Ok(())
    }
}

/// A duration that is shorter than centuries.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The function on the PCI bus.
pub struct Watchdog {
    registers: Mutex<Registers>,
    space: Mutex<ConfigSpace>,
    requests: Arc<dyn GuestRequests>,
    clock: Arc<dyn Clock>,
    timer: Arc<dyn WakeTimer>,
}

impl Watchdog {
    /// Makes a watchdog that counts by `clock`, which must be steady, arms `timer` and asks
    /// `requests`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] never, as its one base address register fits.
    pub fn new(
        requests: Arc<dyn GuestRequests>,
        clock: Arc<dyn Clock>,
        timer: Arc<dyn WakeTimer>,
    ) -> Result<Self, ConfigError> {
        let mut space = ConfigSpace::new(&FunctionId {
            vendor: 0x8086,
            device: 0x25ab,
            revision: 0,
            // A system peripheral, other.
            class: [0x08, 0x80, 0x00],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        space.add_bar(0, BarKind::Memory32, BAR_LEN)?;
        Ok(Self {
            registers: Mutex::new(Registers::new()),
            space: Mutex::new(space),
            requests,
            clock,
            timer,
        })
    }

    /// Does what is due. Called by the control thread after the [`WakeTimer`] has fired; a call
    /// too early or too often is harmless.
    pub fn tick(&self) {
        let now = self.clock.now();
        let due = self.change(|registers| registers.tick(now));
        if due {
            self.requests.request(GuestRequest::Watchdog);
        }
    }

    /// Whether the guest has it count, also while the machine is paused. Any thread may ask; it does not block.
    #[must_use]
    pub fn is_counting(&self) -> bool {
        self.registers().count.is_some()
    }

    /// Does `f` and arms the timer anew, under the lock: the last change is the last to arm.
    fn change<T>(&self, f: impl FnOnce(&mut Registers) -> T) -> T {
        let mut registers = self.registers();
        let before = registers.deadline();
        let result = f(&mut registers);
        let after = registers.deadline();
        if before != after {
            self.timer.arm(after);
        }
        result
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PciFunction for Watchdog {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.space
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.space).read(offset, data);
        let registers = self.registers();
        let [low, high] = registers.config.to_le_bytes();
        for (byte, at) in data.iter_mut().zip(offset..) {
            match at {
                CONFIG => *byte = low,
                at if at == CONFIG + 1 => *byte = high,
                LOCK => *byte = registers.lock,
                _ => (),
            }
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        lock(&self.space).write(offset, data);
        let now = self.clock.now();
        self.change(|registers| {
            for (&byte, at) in data.iter().zip(offset..) {
                match at {
                    // Its bits are all in the lower half.
                    CONFIG => registers.config = u16::from(byte) & CONFIG_BITS,
                    LOCK => registers.write_lock(byte, now),
                    _ => (),
                }
            }
        });
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        self.registers().read(offset, data);
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        let now = self.clock.now();
        self.change(|registers| registers.write(offset, data, now));
    }
}

impl Unit for Watchdog {
    fn name(&self) -> &str {
        NAME
    }

    fn start(&self) -> Result<(), StartError> {
        let now = self.clock.now();
        self.change(|registers| registers.start(now));
        Ok(())
    }

    fn stop(&self, _deadline: Instant) -> Result<(), StopError> {
        let now = self.clock.now();
        self.change(|registers| registers.stop(now));
        Ok(())
    }

    fn reset(&self) {
        lock(&self.space).reset();
        self.change(Registers::reset);
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let space = lock(&self.space).save();
        let state = self.registers().save(self.clock.now(), space);
        Ok(vec![Section::encode(NAME, &state)?])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let state: WatchdogV1 = set.take(NAME, WatchdogV1::SCHEMA)?.decode()?;
        let mut registers = self.registers();
        registers.restore(&state)?;
        lock(&self.space).restore(WatchdogV1::SCHEMA, state.space)
    }
}

#[cfg(test)]
mod tests;
