//! Goes through the disks that are copied, and through what the guest changes of them, as long as the migration lasts.

use std::io::{BufReader, BufWriter, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::{PIECE, Piece, Transfer};
use migration::transport::channel::Clock as _;
use migration::transport::disks::{DiskAnswer, DiskFrame};

use crate::error::chain;
use crate::migrate::limits::Shared;
use crate::migrate::link::Link;
use crate::sandbox::{Builder, Kind};

/// With so little left to be copied memory begins, in bytes.
const ENOUGH: u64 = 8 << 20;
/// The most bytes that have been sent and not acknowledged.
const WINDOW: u64 = 8 << 20;
/// The most frames of which the same is true.
const FRAMES: u64 = 256;
/// How much goes before it is made durable there, in bytes.
const DURABLE: u64 = 256 << 20;
/// How often it is looked whether the guest has changed something.
const LOOK: Duration = Duration::from_millis(50);
/// How often the destination hears that this side is alive.
const ALIVE: Duration = Duration::from_secs(1);
/// After so many times through what has been changed meanwhile the guest is held up.
const TIMES: u32 = 3;
/// The nanoseconds of a second.
const SECOND: u128 = 1_000_000_000;
/// Bytes a second of a connection that nothing has been measured of.
const SLOW: u64 = 8 << 20;
/// The longest that is slept before it is looked whether it is to end.
const NAP: Duration = Duration::from_millis(50);

/// A disk that is copied.
#[derive(Clone)]
pub struct Leaving {
    /// The disk's id, for messages.
    pub id: String,
    /// What is copied of it.
    pub transfer: Arc<Transfer>,
}

/// How far it is.
#[derive(Default)]
struct State {
    /// Frames that have been sent, and how many bytes those were.
    sent: (u64, u64),
    /// Frames that have been acknowledged.
    done: u64,
    /// The bytes of frames that have not, in order.
    under_way: std::collections::VecDeque<u64>,
    /// All has been gone through once, and little is left of what has been changed.
    caught_up: bool,
    /// The guest stands: all is to go, before this pause.
    wanted: Option<u32>,
    /// All has gone, and is durable there.
    drained: Option<u32>,
    /// Bytes a second, as acknowledged.
    rate: u64,
    /// Why it has ended.
    failed: Option<String>,
    /// Why nothing can be sent any more.
    unsent: Option<String>,
    /// It is to end.
    ended: bool,
}

struct Inner {
    disks: Vec<Leaving>,
    shared: Arc<Shared>,
    link: Link,
    state: Mutex<State>,
    changed: Condvar,
}

/// Disks that are being copied, until this is dropped.
pub struct Copying(Arc<Inner>);

impl Copying {
    /// Begins, over `link`, whose preamble has been sent. `wake` is called when something has come of it.
    ///
    /// # Errors
    ///
    /// The host has no threads.
    pub(in crate::migrate) fn begin(
        link: Link,
        disks: Vec<Leaving>,
        shared: Arc<Shared>,
        wake: impl Fn() + Clone + Send + 'static,
    ) -> std::io::Result<Self> {
        let total = disks.iter().map(|disk| disk.transfer.size()).sum();
        shared.status.storage.set_total(total);
        let inner = Arc::new(Inner {
            disks,
            shared,
            link: link.clone(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        // Ends the one thread if there is none for the other.
        let copying = Self(Arc::clone(&inner));
        let (hears, woken) = (Arc::clone(&inner), wake.clone());
        let answers = link.clone();
        let hear = move || {
            let why = hears.hear(answers);
            hears.fail(why);
            woken();
        };
        Builder::new(Kind::Job)
            .name("migration-answers".to_owned())
            .spawn(hear)?;
        let run = move || {
            if let Err(why) = inner.copy(link, &wake) {
                inner.fail(why);
                wake();
            }
        };
        Builder::new(Kind::Job)
            .name("migration-disks".to_owned())
            .spawn(run)?;
        Ok(copying)
    }

    /// Why it goes on no more.
    #[must_use]
    pub fn failed(&self) -> Option<String> {
        self.0.state().failed.clone()
    }

    /// Whether all has been copied once, and little is left of what has been changed.
    #[must_use]
    pub fn has_caught_up(&self) -> bool {
        self.0.state().caught_up
    }

    /// How long it would take now to copy what is left.
    #[must_use]
    pub fn left(&self) -> Duration {
        let left = self.0.left();
        if left == 0 {
            return Duration::ZERO;
        }
        let rate = u128::from(self.0.state().rate.max(1));
        let nanos = u128::from(left).saturating_mul(SECOND) / rate;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Holds up writes of the guest while more is left than goes in this time.
    pub fn hold_up(&self, time: Duration) {
        let rate = u128::from(self.0.state().rate);
        let bytes = rate.saturating_mul(time.as_nanos()) / SECOND;
        let bytes = u64::try_from(bytes).unwrap_or(ENOUGH).min(ENOUGH);
        for disk in &self.0.disks {
            disk.transfer.hold_up(bytes);
        }
    }

    /// Holds up no writes of the guest.
    pub fn let_run(&self) {
        self.0.let_run();
    }

    /// The guest stands: all goes that is left. It is the pause of this number.
    pub fn drain(&self, attempt: u32) {
        self.0.state().wanted = Some(attempt);
        self.0.changed.notify_all();
    }

    /// Waits so long until all that is left is there, and durable: whether it is.
    ///
    /// # Errors
    ///
    /// Why it will not be.
    pub fn wait_until_drained(&self, attempt: u32, time: Duration) -> Result<bool, String> {
        let open = |state: &mut State| state.failed.is_none() && state.drained != Some(attempt);
        let state = self.0.state();
        let waited = self.0.changed.wait_timeout_while(state, time, open);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &state.failed {
            Some(why) => Err(why.clone()),
            None => Ok(state.drained == Some(attempt)),
        }
    }

    /// The guest goes on here.
    pub fn follow(&self) {
        let mut state = self.0.state();
        (state.wanted, state.drained) = (None, None);
        drop(state);
        self.0.changed.notify_all();
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.0.state().ended = true;
        self.0.changed.notify_all();
        self.0.link.hang_up();
        self.let_run();
    }
}

/// What was to be done has been, or it is to end.
type Copied = Result<(), String>;

/// Where frames go.
type Out = BufWriter<Link>;

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first reason counts.
    fn fail(&self, why: String) {
        let mut state = self.state();
        state.failed.get_or_insert(why);
        drop(state);
        self.changed.notify_all();
        self.let_run();
    }

    fn let_run(&self) {
        for disk in &self.disks {
            disk.transfer.hold_up(u64::MAX);
        }
    }

    /// Hears what the destination says, until there is nothing more: why.
    fn hear(&self, link: Link) -> String {
        let mut from = BufReader::new(link);
        let mut payload = Vec::new();
        loop {
            match DiskAnswer::read(&mut from, &mut payload) {
                Ok(DiskAnswer::Done(count)) => {
                    let mut state = self.state();
                    if count <= state.done || count > state.sent.0 {
                        return "the destination acknowledges what was not sent".to_owned();
                    }
                    let more = usize::try_from(count.saturating_sub(state.done));
                    let more = more.unwrap_or(usize::MAX).min(state.under_way.len());
                    state.under_way.drain(..more);
                    state.done = count;
                    drop(state);
                    self.changed.notify_all();
                }
                Ok(DiskAnswer::Failed(_, why)) => {
                    return format!("a disk cannot be copied: {why}");
                }
                Err(error) => {
                    let why = self.state().unsent.clone();
                    let why = why.unwrap_or_else(|| chain(&error));
                    return format!(
                        "the connection of the disks to the destination is lost: {why}"
                    );
                }
            }
        }
    }

    /// Nothing can be sent any more: why, of which what the destination has said before it hung up is the cause. That is heard to its end first.
    fn unsent(&self, why: String) -> String {
        self.state().unsent = Some(why.clone());
        self.link.stop_reading();
        let open = |state: &mut State| state.failed.is_none() && !state.ended;
        let waited = self.changed.wait_while(self.state(), open);
        let state = waited.unwrap_or_else(PoisonError::into_inner);
        state.failed.clone().unwrap_or(why)
    }

    fn check(state: &State) -> Copied {
        match &state.failed {
            Some(why) => Err(why.clone()),
            None if state.ended => Err("it has ended".to_owned()),
            None => Ok(()),
        }
    }

    fn copy(&self, link: Link, wake: &dyn Fn()) -> Copied {
        let mut out = BufWriter::with_capacity(16 << 10, link);
        let mut begun = Instant::now();
        self.copy_all(&mut out)?;
        let mut sent = self.state().sent.1;
        let mut times = 0_u32;
        loop {
            let (wanted, drained) = {
                let state = self.state();
                (state.wanted, state.drained)
            };
            match wanted {
                Some(attempt) if drained != wanted => {
                    self.catch_up(&mut out)?;
                    self.flush(attempt, &mut out)?;
                    let mut state = self.state();
                    if state.wanted == wanted {
                        state.drained = wanted;
                    }
                    drop(state);
                    self.changed.notify_all();
                }
                Some(_) => {}
                None => {
                    sent = sent.saturating_add(self.catch_up(&mut out)?);
                    if sent > 0 || times == 0 {
                        // Little is to be made durable in the pause.
                        self.flush(0, &mut out)?;
                        self.measure(sent, begun);
                    }
                    times = times.saturating_add(1);
                    self.judge(times, wake);
                }
            }
            self.rest(wanted, &mut out)?;
            (sent, begun) = (0, Instant::now());
        }
    }

    /// What is left to be copied once more, in bytes.
    fn left(&self) -> u64 {
        let add = |sum: u64, disk: &Leaving| sum.saturating_add(disk.transfer.left());
        self.disks.iter().fold(0, add)
    }

    /// Goes once through all.
    fn copy_all(&self, out: &mut Out) -> Copied {
        let add = |sum: u64, disk: &Leaving| sum.saturating_add(disk.transfer.size());
        let mut left = self.disks.iter().fold(0, add);
        let (mut told, mut durable) = (Instant::now(), 0);
        for (number, disk) in (0..).zip(&self.disks) {
            let size = disk.transfer.size();
            let mut at = 0;
            while at < size {
                let len = self.copy_piece((number, disk), at..size, true, out)?;
                at = at.saturating_add(len);
                left = left.saturating_sub(len);
                let changed = self.left();
                self.shared
                    .status
                    .storage
                    .set_remaining(left.saturating_add(changed));
                self.shared.policy().got_on(self.shared.clock.now());
                let sent = self.state().sent.1;
                if sent.saturating_sub(durable) >= DURABLE {
                    // No sync at the end takes so long that the peer is taken for lost.
                    self.flush(0, out)?;
                    durable = sent;
                } else if told.elapsed() >= ALIVE {
                    // Zeros may go on for long, and nothing of them is sent.
                    self.send(&DiskFrame::Keepalive, out)?;
                    self.push(out)?;
                    told = Instant::now();
                }
            }
        }
        Ok(())
    }

    /// Goes once through what has been changed: how many bytes that was.
    fn catch_up(&self, out: &mut Out) -> Result<u64, String> {
        let mut sent: u64 = 0;
        for (number, disk) in (0..).zip(&self.disks) {
            let mut at = 0;
            while let Some(range) = disk.transfer.changed(at) {
                sent = sent.saturating_add(range.end.saturating_sub(range.start));
                at = range.start;
                while at < range.end {
                    let part = at..range.end;
                    let len = self.copy_piece((number, disk), part, false, out)?;
                    at = at.saturating_add(len);
                }
            }
        }
        self.shared.status.storage.set_remaining(self.left());
        Ok(sent)
    }

    /// Copies what is next of a range: how far it goes. What is `fresh` there need not be made zeros.
    fn copy_piece(
        &self,
        (number, disk): (u16, &Leaving),
        range: std::ops::Range<u64>,
        fresh: bool,
        out: &mut Out,
    ) -> Result<u64, String> {
        let (id, offset) = (&disk.id, range.start);
        let piece = disk.transfer.piece(range);
        let piece =
            piece.map_err(|error| format!("disk {id}: at byte {offset}: {}", chain(&error)))?;
        let len = piece.len();
        let whole = disk.transfer.base().is_none();
        match &piece {
            Piece::Data(bytes) => self.send(
                &DiskFrame::Data {
                    disk: number,
                    offset,
                    bytes,
                },
                out,
            )?,
            Piece::Zeros(_) if fresh && whole => Self::check(&self.state())?,
            Piece::Zeros(len) => self.send(
                &DiskFrame::Zeros {
                    disk: number,
                    offset,
                    len: *len,
                },
                out,
            )?,
            Piece::Below(_) => Self::check(&self.state())?,
        }
        Ok(len)
    }

    /// Has all be made durable that has gone, and waits for that.
    fn flush(&self, attempt: u32, out: &mut Out) -> Copied {
        self.send(&DiskFrame::Flush { attempt }, out)?;
        self.push(out)?;
        let open = |state: &mut State| {
            !state.under_way.is_empty() && state.failed.is_none() && !state.ended
        };
        let waited = self.changed.wait_while(self.state(), open);
        Self::check(&waited.unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends a frame as soon as it may go.
    fn send(&self, frame: &DiskFrame<'_>, out: &mut Out) -> Copied {
        let len = match frame {
            DiskFrame::Data { bytes, .. } => bytes.len() as u64,
            _ => 0,
        };
        let full = |state: &State| {
            let bytes: u64 = state.under_way.iter().sum();
            bytes.saturating_add(len) > WINDOW.max(PIECE) || state.under_way.len() as u64 >= FRAMES
        };
        if full(&self.state()) {
            self.push(out)?;
        }
        let open = |state: &mut State| full(state) && state.failed.is_none() && !state.ended;
        let waited = self.changed.wait_while(self.state(), open);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        Self::check(&state)?;
        state.sent.0 = state.sent.0.saturating_add(1);
        state.sent.1 = state.sent.1.saturating_add(len);
        state.under_way.push_back(len);
        drop(state);
        self.keep_to_the_limit(len)?;
        let sent = frame.write(out);
        let sent = sent.map_err(|error| self.unsent(chain(&error)))?;
        self.shared.status.storage.add(sent);
        Ok(())
    }

    fn push(&self, out: &mut Out) -> Copied {
        let pushed = out.flush();
        pushed.map_err(|error| self.unsent(error.to_string()))
    }

    /// Waits until so many bytes may go, unless the guest stands.
    fn keep_to_the_limit(&self, bytes: u64) -> Copied {
        let limiter = &self.shared.limiter;
        let mut wait = limiter.take(bytes, self.shared.clock.now());
        while !wait.is_zero() && limiter.rate().is_some() {
            Self::check(&self.state())?;
            if self.shared.status.stop.load(Ordering::Relaxed) && self.shared.status.is_cancelled()
            {
                return Err("it was cancelled".to_owned());
            }
            let nap = wait.min(NAP);
            self.shared.clock.sleep(nap);
            wait = wait.saturating_sub(nap);
        }
        Ok(())
    }

    /// So many bytes have gone since then. The fastest counts: an idle time, or a limit, says nothing of a pause.
    fn measure(&self, bytes: u64, begun: Instant) {
        let nanos = begun.elapsed().as_nanos().max(1);
        let rate = u128::from(bytes).saturating_mul(SECOND) / nanos;
        let mut state = self.state();
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        state.rate = state.rate.max(rate).max(SLOW);
    }

    /// Whether memory may go, and the guest is to be held up.
    fn judge(&self, times: u32, wake: &dyn Fn()) {
        let left = self.left();
        let mut state = self.state();
        let before = state.caught_up;
        state.caught_up = before || left <= ENOUGH;
        let now = state.caught_up;
        drop(state);
        if now && !before {
            wake();
        }
        let may_slow = self.shared.policy().parameters().throttle.is_some();
        if !now && times > TIMES && may_slow {
            for disk in &self.disks {
                disk.transfer.hold_up(ENOUGH / 2);
            }
        }
    }

    /// Waits a moment for something to do, and shows that this side is alive.
    fn rest(&self, wanted: Option<u32>, out: &mut Out) -> Copied {
        let begun = Instant::now();
        if wanted.is_none() && !self.state().caught_up {
            return Ok(());
        }
        loop {
            let open = |state: &mut State| {
                state.failed.is_none() && !state.ended && state.wanted == wanted
            };
            let waited = self.changed.wait_timeout_while(self.state(), LOOK, open);
            let (mut state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            Self::check(&state)?;
            if !waited.timed_out() {
                return Ok(());
            }
            if begun.elapsed() >= ALIVE {
                if state.under_way.is_empty() {
                    state.sent.0 = state.sent.0.saturating_add(1);
                    state.under_way.push_back(0);
                    drop(state);
                    let sent = DiskFrame::Keepalive.write(out);
                    sent.map_err(|error| self.unsent(chain(&error)))?;
                    self.push(out)?;
                }
                return Ok(());
            }
            drop(state);
            if wanted.is_none() && self.left() > 0 {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use api::wire::MigrationDirection;
    use migration::transport::precopy::Parameters;

    use super::*;
    use crate::migrate::status::Status;

    /// Why disks are not copied to a destination that hangs up when it has said `words`.
    fn hung_up(words: &[u8]) -> String {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(words).unwrap();
        drop(far);
        let status = Status::new(MigrationDirection::Outgoing, String::new(), None);
        let parameters = Parameters::preset("default").unwrap();
        let shared = Arc::new(Shared::new(parameters, 0, Arc::new(status)));
        let link = Link::new(near.into()).unwrap();
        let copying = Copying::begin(link, Vec::new(), shared, || {}).unwrap();
        loop {
            match copying.wait_until_drained(1, Duration::from_secs(1)) {
                Ok(whole) => assert!(!whole),
                Err(why) => return why,
            }
        }
    }

    #[test]
    fn what_a_destination_says_of_a_disk_counts_before_the_loss_of_its_connection() {
        let mut words = Vec::new();
        let full = "disk d: there is no room".to_owned();
        DiskAnswer::Failed(0, full.clone())
            .write(&mut words)
            .unwrap();
        for _ in 0..200 {
            let why = hung_up(&words);
            assert!(why.contains(&full), "{why}");
        }
        let why = hung_up(&[]);
        assert!(why.contains("is lost: "), "{why}");
    }
}
