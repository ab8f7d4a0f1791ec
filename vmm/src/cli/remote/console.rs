//! `vireo console`: this terminal at the serial port of a machine.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::num::NonZero;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;

use anyhow::Context;
use api::client::Client;
use api::wire::{ConsolePort, ConsoleRequest, VmConsoleSize};
use clap::{Args, ValueEnum};
use rustix::io::{Errno, read, write};

use super::super::message;
use super::super::target::Target;
use crate::console::{Escape, EscapeFilter, RawMode, terminal_size};
use crate::machine::Signals;
use crate::machine::driver::ppoll;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo console web
      Type to the guest, with its latest output first; Ctrl-a d leaves it running.
  vireo console web --no-replay < /dev/null | tee web.log
      Follow what it writes from now on.";

const HELP: &str = "Ctrl-a d (or x): detach; Ctrl-a a: send Ctrl-a; Ctrl-a h: this help";
/// The keys that detach, behind Ctrl-a.
const DETACH: &[u8] = b"dDxX";
/// How many bytes are under way in each direction. A pipe that can be written takes as many.
const PIECE: usize = 4096;

#[derive(Debug, Args)]
pub(in crate::cli) struct ConsoleArgs {
    #[command(flatten)]
    target: Target,
    /// Which console: serial, serial2, serial3, serial4, console (hvc0)
    #[arg(
        long,
        value_name = "WHICH",
        value_enum,
        default_value = "serial",
        hide_possible_values = true
    )]
    port: Which,
    /// Leave out what the guest has written before
    #[arg(long)]
    no_replay: bool,
}

/// The consoles, as words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Which {
    Serial,
    Serial2,
    Serial3,
    Serial4,
    Console,
}

impl From<Which> for ConsolePort {
    fn from(which: Which) -> Self {
        match which {
            Which::Serial => Self::Serial,
            Which::Serial2 => Self::Serial2,
            Which::Serial3 => Self::Serial3,
            Which::Serial4 => Self::Serial4,
            Which::Console => Self::Console,
        }
    }
}

pub(super) fn attach(arguments: &ConsoleArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let request = ConsoleRequest {
        replay: !arguments.no_replay,
        port: arguments.port.into(),
    };
    let stream = remote.connect_further(|client| client.attach_to(&request));
    let stream = stream.map_err(|error| remote.failed(error))?;
    // A signal that ended the process at once would leave the terminal raw.
    let signals = Signals::block_ending().context("cannot watch for signals")?;
    let (input, output) = (io::stdin(), io::stdout());
    let raw = RawMode::enter(input.as_fd()).context("cannot set up the terminal")?;
    if raw.is_some() {
        message::note(&format!("attached to {}: {HELP}", remote.who));
    }
    let shown = raw.is_some() && arguments.port == Which::Console;
    let window = shown.then(|| Window::begin(&mut remote.client)).transpose();
    let mut session = Session {
        stream,
        input: input.as_fd(),
        output: output.as_fd(),
        stop: Some(signals.raw_fd()),
        window: window.context("cannot watch for the window's size")?,
        escapes: raw.is_some().then(|| EscapeFilter::leaving_on(DETACH)),
        to_guest: Vec::new(),
        to_user: Vec::new(),
        typing: true,
    };
    let end = session.run();
    drop(session);
    let was_raw = raw.is_some();
    // Messages come behind it.
    drop(raw);
    match end.with_context(|| format!("the console of {}", remote.who))? {
        End::Detached if was_raw => message::note(&format!("detached from {}", remote.who)),
        End::Closed if was_raw => message::note(&format!("{} has closed its console", remote.who)),
        End::Detached | End::Closed | End::Stopped => (),
    }
    Ok(())
}

/// The window of a terminal, of whose size the guest is told.
struct Window<'a> {
    /// Readable when it may have another size.
    changes: Signals,
    tell: Box<dyn FnMut() + Send + 'a>,
}

impl<'a> Window<'a> {
    /// Tells of the size that it has now.
    fn begin(client: &'a mut Client) -> io::Result<Self> {
        let mut client = Some(client);
        let tell = move || {
            let size = terminal_size()
                .and_then(|(columns, rows)| NonZero::new(columns).zip(NonZero::new(rows)));
            let (Some((columns, rows)), Some(to)) = (size, &mut client) else {
                return;
            };
            if to.size_console(VmConsoleSize { columns, rows }).is_err() {
                // The console works without.
                client = None;
            }
        };
        let mut window = Self {
            changes: Signals::block_window()?,
            tell: Box::new(tell),
        };
        (window.tell)();
        Ok(window)
    }

    fn changed(&mut self) {
        while self.changes.take().is_some() {}
        (self.tell)();
    }
}

/// Why a session is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The user has left, or nobody reads any more.
    Detached,
    /// The monitor has closed: the machine has ended.
    Closed,
    /// A signal.
    Stopped,
}

/// A console between a stream and a user.
struct Session<'a> {
    stream: UnixStream,
    input: BorrowedFd<'a>,
    output: BorrowedFd<'a>,
    /// Ends the session when it is readable.
    stop: Option<RawFd>,
    /// Where the output is shown, if the guest is to know its size.
    window: Option<Window<'a>>,
    /// Where a user types.
    escapes: Option<EscapeFilter>,
    /// What has been read and not yet been written.
    to_guest: Vec<u8>,
    to_user: Vec<u8>,
    /// The input has not ended.
    typing: bool,
}

/// What can be done without waiting.
struct Ready {
    stop: bool,
    resized: bool,
    heard: bool,
    typed: bool,
    guest: bool,
    user: bool,
    user_gone: bool,
}

impl Session<'_> {
    /// Passes bytes on until one side has had enough. The input's end is only that: what the guest writes is still shown.
    fn run(&mut self) -> io::Result<End> {
        self.stream.set_nonblocking(true)?;
        loop {
            let ready = self.wait()?;
            if ready.stop {
                return Ok(End::Stopped);
            }
            if ready.user_gone {
                return Ok(End::Detached);
            }
            if ready.resized
                && let Some(window) = &mut self.window
            {
                window.changed();
            }
            if ready.user && !self.show()? {
                return Ok(End::Detached);
            }
            if ready.guest && !self.send()? {
                return Ok(End::Closed);
            }
            if ready.typed && !self.take()? {
                return Ok(End::Detached);
            }
            if ready.heard && !self.hear()? {
                return Ok(End::Closed);
            }
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let entry = |fd: RawFd, events| libc::pollfd {
            fd,
            events,
            revents: 0,
        };
        let wanted = |wanted, event| if wanted { event } else { 0 };
        let hearing = wanted(self.to_user.is_empty(), libc::POLLIN);
        let telling = wanted(!self.to_guest.is_empty(), libc::POLLOUT);
        let reading = self.typing && self.to_guest.is_empty();
        let mut fds = [
            entry(self.stop.unwrap_or(-1), libc::POLLIN),
            // One at which nothing is wanted would still tell that it has ended.
            entry(
                if hearing | telling == 0 {
                    -1
                } else {
                    self.stream.as_raw_fd()
                },
                hearing | telling,
            ),
            entry(
                if reading { self.input.as_raw_fd() } else { -1 },
                libc::POLLIN,
            ),
            entry(
                self.output.as_raw_fd(),
                wanted(!self.to_user.is_empty(), libc::POLLOUT),
            ),
            entry(
                self.window
                    .as_ref()
                    .map_or(-1, |window| window.changes.raw_fd()),
                libc::POLLIN,
            ),
        ];
        ppoll(&mut fds, None)?;
        let [stop, stream, input, output, window] = fds.map(|entry| entry.revents);
        let over = libc::POLLHUP | libc::POLLERR | libc::POLLNVAL;
        Ok(Ready {
            stop: stop != 0,
            resized: window != 0,
            heard: hearing != 0 && stream & (libc::POLLIN | over) != 0,
            guest: telling != 0 && stream & (libc::POLLOUT | over) != 0,
            typed: input != 0,
            user: output & libc::POLLOUT != 0,
            user_gone: output & over != 0,
        })
    }

    /// Writes to the user; whether anybody reads.
    fn show(&mut self) -> io::Result<bool> {
        let piece = self.to_user.get(..PIECE).unwrap_or(&self.to_user);
        match write(self.output, piece) {
            Ok(length) => {
                self.to_user.drain(..length.min(self.to_user.len()));
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(true),
            Err(Errno::PIPE | Errno::IO) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes to the guest; whether the monitor takes it.
    fn send(&mut self) -> io::Result<bool> {
        match (&self.stream).write_some(&self.to_guest)? {
            Some(length) => {
                self.to_guest.drain(..length.min(self.to_guest.len()));
                self.finish_typing()?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Reads what the user types; whether the session goes on.
    fn take(&mut self) -> io::Result<bool> {
        let mut piece = [0; PIECE];
        let length = match read(self.input, &mut piece) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
            // The terminal has gone.
            Err(Errno::IO) if self.escapes.is_some() => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let typed = piece.get(..length).unwrap_or_default();
        let Some(escapes) = &mut self.escapes else {
            self.to_guest.extend_from_slice(typed);
            self.typing = length > 0;
            self.finish_typing()?;
            return Ok(true);
        };
        match escapes.filter(typed, &mut self.to_guest) {
            Some(Escape::Quit) => {
                // What was typed before is the guest's, as far as the monitor takes it at once.
                self.send()?;
                return Ok(false);
            }
            Some(Escape::Help) => message::note(HELP),
            None => (),
        }
        Ok(length > 0)
    }

    /// Tells the monitor when no more will be typed.
    fn finish_typing(&self) -> io::Result<()> {
        if self.typing || !self.to_guest.is_empty() {
            return Ok(());
        }
        match self.stream.shutdown(Shutdown::Write) {
            // That is heard when it is read from.
            Err(error) if error.kind() == ErrorKind::NotConnected => Ok(()),
            other => other,
        }
    }

    /// Reads what the guest writes; whether there will be more.
    fn hear(&mut self) -> io::Result<bool> {
        let mut piece = [0; PIECE];
        match read(&self.stream, &mut piece) {
            Ok(0) | Err(Errno::CONNRESET) => Ok(false),
            Ok(length) => {
                let heard = piece.get(..length).unwrap_or_default();
                self.to_user.extend_from_slice(heard);
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}

/// Writes that do not wait.
trait WriteSome {
    /// How much was written; `None` when the other end has gone.
    fn write_some(self, bytes: &[u8]) -> io::Result<Option<usize>>;
}

impl WriteSome for &UnixStream {
    fn write_some(self, bytes: &[u8]) -> io::Result<Option<usize>> {
        match write(self, bytes) {
            Ok(length) => Ok(Some(length)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Some(0)),
            Err(Errno::PIPE | Errno::CONNRESET) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::thread;

    use super::*;
    use crate::console::open_pty;

    /// A session over this input and output, and the monitor's end of it.
    fn session<'a>(
        input: BorrowedFd<'a>,
        output: BorrowedFd<'a>,
        stop: Option<RawFd>,
        escapes: bool,
    ) -> (Session<'a>, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        let session = Session {
            stream: near,
            input,
            output,
            stop,
            window: None,
            escapes: escapes.then(|| EscapeFilter::leaving_on(DETACH)),
            to_guest: Vec::new(),
            to_user: Vec::new(),
            typing: true,
        };
        (session, far)
    }

    #[test]
    fn a_user_types_sees_and_detaches() {
        let (mut keys, far, _) = open_pty().unwrap();
        let (user, shown) = UnixStream::pair().unwrap();
        let (mut session, mut guest) = session(far.as_fd(), shown.as_fd(), None, true);
        guest.write_all(b"file\r\n").unwrap();
        thread::scope(|scope| {
            let run = scope.spawn(move || session.run().unwrap());
            let mut seen = [0; 6];
            (&user).read_exact(&mut seen).unwrap();
            assert_eq!(&seen, b"file\r\n");
            keys.write_all(b"ls\r\x01a\x01dlost").unwrap();
            assert_eq!(run.join().unwrap(), End::Detached);
        });
        let mut typed = Vec::new();
        guest.read_to_end(&mut typed).unwrap();
        assert_eq!(typed, b"ls\r\x01");
    }

    #[test]
    fn a_pipe_is_passed_on_as_it_is_and_its_end_is_not_the_end() {
        let (mut typist, input) = UnixStream::pair().unwrap();
        let (mut user, shown) = UnixStream::pair().unwrap();
        let (mut session, mut guest) = session(input.as_fd(), shown.as_fd(), None, false);
        let text = b"\x01d\x01x".repeat(100_000);
        let end = thread::scope(|scope| {
            let run = scope.spawn(move || session.run().unwrap());
            let sent = text.clone();
            scope.spawn(move || {
                typist.write_all(&sent).unwrap();
            });
            let mut typed = Vec::new();
            guest.read_to_end(&mut typed).unwrap();
            assert_eq!(typed, text);
            // Nobody types any more, and the guest goes on.
            guest.write_all(b"late").unwrap();
            let mut seen = [0; 4];
            user.read_exact(&mut seen).unwrap();
            assert_eq!(&seen, b"late");
            drop(guest);
            run.join().unwrap()
        });
        assert_eq!(end, End::Closed);
    }

    #[test]
    fn nothing_of_the_guests_last_output_is_lost_on_a_slow_user() {
        let (_typist, input) = UnixStream::pair().unwrap();
        let (mut user, shown) = UnixStream::pair().unwrap();
        let (mut session, mut guest) = session(input.as_fd(), shown.as_fd(), None, false);
        let text = b"0123456789".repeat(100_000);
        thread::scope(|scope| {
            let run = scope.spawn(move || session.run().unwrap());
            let sent = text.clone();
            scope.spawn(move || guest.write_all(&sent).unwrap());
            let mut seen = vec![0; text.len()];
            user.read_exact(&mut seen).unwrap();
            assert_eq!(seen, text);
            assert_eq!(run.join().unwrap(), End::Closed);
        });
    }

    #[test]
    fn a_signal_and_a_reader_that_goes_away_end_it() {
        let (_typist, input) = UnixStream::pair().unwrap();
        let (user, shown) = UnixStream::pair().unwrap();
        let (mut stopper, stop) = UnixStream::pair().unwrap();
        stopper.write_all(b"x").unwrap();
        let stop = Some(stop.as_raw_fd());
        let (mut stopped, _guest) = session(input.as_fd(), shown.as_fd(), stop, false);
        assert_eq!(stopped.run().unwrap(), End::Stopped);
        drop(user);
        let (mut unread, _guest) = session(input.as_fd(), shown.as_fd(), None, false);
        assert_eq!(unread.run().unwrap(), End::Detached);
    }

    #[test]
    fn another_size_of_the_window_is_told_and_the_session_goes_on() {
        let (_typist, input) = UnixStream::pair().unwrap();
        let (mut user, shown) = UnixStream::pair().unwrap();
        let (sizes, told) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            let (mut session, mut guest) = session(input.as_fd(), shown.as_fd(), None, false);
            // The signal is blocked in the session's thread before it is sent to that.
            let (ready, thread) = std::sync::mpsc::channel();
            let run = scope.spawn(move || {
                let sizes = sizes.clone();
                session.window = Some(Window {
                    changes: Signals::block_window().unwrap(),
                    tell: Box::new(move || sizes.send(()).unwrap()),
                });
                ready.send(thread_id()).unwrap();
                session.run().unwrap()
            });
            let thread = thread.recv().unwrap();
            for _ in 0..2 {
                resize(thread);
                told.recv().unwrap();
            }
            guest.write_all(b"late").unwrap();
            let mut seen = [0; 4];
            user.read_exact(&mut seen).unwrap();
            assert_eq!(&seen, b"late");
            drop(guest);
            assert_eq!(run.join().unwrap(), End::Closed);
        });
    }

    #[expect(unsafe_code, reason = "gettid is a system call")]
    fn thread_id() -> libc::pid_t {
        // SAFETY: it has no arguments and always succeeds.
        unsafe { libc::gettid() }
    }

    /// Sends SIGWINCH to a thread of this process.
    #[expect(unsafe_code, reason = "tgkill is a system call")]
    fn resize(thread: libc::pid_t) {
        let process = i64::from(std::process::id());
        let (thread, signal) = (i64::from(thread), i64::from(libc::SIGWINCH));
        // SAFETY: the arguments are numbers.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
        assert_eq!(sent, 0);
    }

    #[test]
    fn a_terminal_that_is_hung_up_detaches() {
        let (keys, far, _) = open_pty().unwrap();
        let null = File::options().write(true).open("/dev/null").unwrap();
        let (mut session, _guest) = session(far.as_fd(), null.as_fd(), None, true);
        drop(keys);
        assert_eq!(session.run().unwrap(), End::Detached);
    }
}
