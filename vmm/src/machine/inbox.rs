//! The control thread's inbox: commands, guest requests and stopped vCPUs.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use api::{Answer, Command, ControlError, ErrorKind, Reply};
use devices::pci::PciAddress;
use devices::{GuestRequest, GuestRequests};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::driver::Driver;
use super::vcpus::StopFlag;
use crate::kvm::vcpu::Stop;

/// Something that the control thread does for another thread.
pub type Errand = Box<dyn FnOnce(&mut Driver) + Send>;

/// A disk's request that failed and waits for the machine to be paused and resumed.
#[derive(Debug)]
pub struct DiskStopped {
    /// The device's id.
    pub id: String,
    /// What failed, and why.
    pub what: String,
    /// The host has no room.
    pub no_space: bool,
}

/// What reaches the control thread.
pub enum Message {
    /// Somebody commands, and is to be answered.
    Command(Command, Answer),
    /// The guest asks through a device.
    Guest(GuestRequest),
    /// A vCPU stopped for a reason of its own.
    Vcpu(u32, Stop),
    /// The user at the console asks for the end, or has closed the terminal.
    ConsoleEnd,
    /// A disk's request failed and waits: the machine is to be paused.
    DiskStopped(DiskStopped),
    /// The guest has done something with a slot for vCPUs or memory.
    SlotNews,
    /// The guest gives up what is in a PCI slot.
    PciEject(PciAddress),
    /// A debugger's errand; vCPUs may be running.
    Errand(Errand),
}

/// The sending side. Clones share one inbox.
#[derive(Clone)]
pub struct Mailbox {
    sender: Sender<Message>,
    wake: Arc<EventFd>,
    crash_told: Arc<AtomicBool>,
    /// There is a machine.
    open: Arc<AtomicBool>,
}

/// The control thread's side.
pub struct Inbox {
    receiver: Receiver<Message>,
    /// Received, but to be looked at later.
    kept: VecDeque<Message>,
    wake: Arc<EventFd>,
    /// [`GuestRequest::CrashLoaded`] is in the inbox. It is the one request
    /// after which the guest goes on, so it is told once until it is taken: many
    /// vCPUs that repeat it would else fill the inbox faster than it is emptied.
    crash_told: Arc<AtomicBool>,
    /// There is a machine that errands can be run for.
    open: Arc<AtomicBool>,
}

/// Makes an inbox and its mailbox.
///
/// # Errors
///
/// The host's, when it is out of descriptors.
pub fn inbox() -> io::Result<(Mailbox, Inbox)> {
    let (sender, receiver) = channel();
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    let crash_told = Arc::new(AtomicBool::new(false));
    let open = Arc::new(AtomicBool::new(false));
    Ok((
        Mailbox {
            sender,
            wake: Arc::clone(&wake),
            crash_told: Arc::clone(&crash_told),
            open: Arc::clone(&open),
        },
        Inbox {
            receiver,
            kept: VecDeque::new(),
            wake,
            crash_told,
            open,
        },
    ))
}

impl Mailbox {
    /// Carries out a command and waits until that is done. Not for the control thread.
    ///
    /// # Errors
    ///
    /// The command's, and [`ended`].
    pub fn call(&self, command: Command) -> Result<Reply, ControlError> {
        let (sender, receiver) = channel();
        let answer: Answer = Box::new(move |result| {
            // The asker waits below.
            let _ = sender.send(result);
        });
        if !self.send(Message::Command(command, answer)) {
            return Err(ended());
        }
        receiver.recv().unwrap_or_else(|_| Err(ended()))
    }

    /// Has the control thread look for what else it waits for.
    pub fn rouse(&self) {
        // A full eventfd wakes as well as one more count would.
        let _ = self.wake.write(1);
    }

    /// Leaves a message and wakes the control thread. Never blocks. `false`
    /// when the monitor has ended, and for an errand when there is no machine.
    pub fn send(&self, message: Message) -> bool {
        if matches!(message, Message::Guest(GuestRequest::CrashLoaded))
            && self.crash_told.swap(true, Ordering::AcqRel)
        {
            return true;
        }
        let errand = matches!(message, Message::Errand(_));
        let sent = self.sender.send(message).is_ok();
        // A full eventfd wakes as well as one more count would.
        let _ = self.wake.write(1);
        // Looked at only now: an errand that is left before the machine's end
        // is dropped by it, and its sender hears of that.
        sent && (!errand || self.open.load(Ordering::SeqCst))
    }
}

impl Inbox {
    /// Readable while there are messages.
    #[must_use]
    pub fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// The next message, if there is one; call until there is none.
    #[must_use]
    pub fn take(&mut self) -> Option<Message> {
        // Cleared before looking, so that a message sent in between wakes again.
        let _ = self.wake.read();
        let message = self
            .kept
            .pop_front()
            .or_else(|| self.receiver.try_recv().ok())?;
        if matches!(message, Message::Guest(GuestRequest::CrashLoaded)) {
            self.crash_told.store(false, Ordering::Release);
        }
        Some(message)
    }

    /// The first message that `test` wants, before those that it does not; they keep their places.
    /// Call until there is none.
    #[must_use]
    pub fn take_where(&mut self, test: impl FnMut(&Message) -> bool) -> Option<Message> {
        // Cleared before looking, so that a message sent in between wakes again.
        let _ = self.wake.read();
        self.kept.extend(self.receiver.try_iter());
        let index = self.kept.iter().position(test)?;
        self.kept.remove(index)
    }

    /// Whether there is a message that `test` wants. All keep their places, and call [`Inbox::rouse`] for them.
    #[must_use]
    pub fn has(&mut self, test: impl Fn(&Message) -> bool) -> bool {
        // Cleared before looking, so that a message sent in between wakes again.
        let _ = self.wake.read();
        self.kept.extend(self.receiver.try_iter());
        self.kept.iter().any(test)
    }

    /// Has the inbox seem to have messages, for one who stops taking them
    /// before there is none.
    pub fn rouse(&self) {
        // A full eventfd wakes as well as one more count would.
        let _ = self.wake.write(1);
    }

    /// There is a new machine: from now on errands are taken. What was left
    /// for others is dropped.
    pub fn open(&mut self) {
        self.forget_machine();
        self.open.store(true, Ordering::SeqCst);
    }

    /// There is no machine any more: errands are refused, and with all else
    /// that it would have taken those that wait are dropped. Commands keep their place.
    pub fn close(&mut self) {
        self.open.store(false, Ordering::SeqCst);
        self.forget_machine();
    }

    fn forget_machine(&mut self) {
        self.forget_guest();
        self.kept
            .retain(|message| matches!(message, Message::Command(..)));
    }

    /// Drops what the guest and its vCPUs have said so far: it belongs to a
    /// guest that is gone. Everything else keeps its place. vCPUs are idle.
    pub fn forget_guest(&mut self) {
        self.forget_disks();
        self.kept
            .retain(|message| !matches!(message, Message::Guest(_) | Message::Vcpu(..)));
        self.crash_told.store(false, Ordering::Release);
    }

    /// Drops what disks have said of requests that wait: the devices are
    /// stopped, and do them again, or not, once they start. Everything else
    /// keeps its place.
    pub fn forget_disks(&mut self) {
        self.kept.extend(self.receiver.try_iter());
        self.kept
            .retain(|message| !matches!(message, Message::DiskStopped(_)));
    }
}

/// The answer to those whose command comes too late.
#[must_use]
pub fn ended() -> ControlError {
    ControlError::new(ErrorKind::Conflict, "the monitor is ending")
}

/// Takes requests from devices on vCPU threads, and holds the vCPUs: the one
/// that asked goes no further until the control thread has decided.
pub struct RequestDesk {
    /// Where requests go.
    pub mailbox: Mailbox,
    /// Stops the vCPUs at their next exit.
    pub stop: StopFlag,
}

impl GuestRequests for RequestDesk {
    fn request(&self, request: GuestRequest) {
        self.stop.store(true, Ordering::Release);
        self.mailbox.send(Message::Guest(request));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_stopped_disk_said_is_forgotten_and_all_else_keeps_its_order() {
        let (mailbox, mut inbox) = inbox().unwrap();
        let disk = || {
            Message::DiskStopped(DiskStopped {
                id: "disk0".to_owned(),
                what: "write failed".to_owned(),
                no_space: true,
            })
        };
        for message in [
            Message::ConsoleEnd,
            disk(),
            Message::Guest(GuestRequest::Reset),
            disk(),
        ] {
            assert!(mailbox.send(message));
        }
        inbox.forget_disks();
        assert!(mailbox.send(disk()));
        assert!(matches!(inbox.take(), Some(Message::ConsoleEnd)));
        assert!(matches!(inbox.take(), Some(Message::Guest(_))));
        assert!(matches!(inbox.take(), Some(Message::DiskStopped(_))));
        assert!(mailbox.send(disk()));
        inbox.forget_guest();
        assert!(inbox.take().is_none());
    }

    #[test]
    fn an_errand_for_a_machine_that_is_gone_is_refused_or_dropped() {
        let (mailbox, mut inbox) = inbox().unwrap();
        let errand = || {
            let (alive, gone) = channel::<()>();
            let sent = mailbox.send(Message::Errand(Box::new(move |_| drop(alive))));
            (sent, gone)
        };
        assert!(!errand().0);
        inbox.open();
        let (sent, gone) = errand();
        assert!(sent);
        let answer: Answer = Box::new(|_| ());
        assert!(mailbox.send(Message::Command(Command::Quit, answer)));
        inbox.close();
        assert!(gone.recv().is_err());
        assert!(!errand().0);
        assert!(matches!(inbox.take(), Some(Message::Command(..))));
    }

    #[test]
    fn a_crash_report_waits_once_however_often_it_is_made() {
        let (mailbox, mut inbox) = inbox().unwrap();
        let report = || mailbox.send(Message::Guest(GuestRequest::CrashLoaded));
        for _ in 0..1000 {
            assert!(report());
        }
        assert!(inbox.take().is_some());
        assert!(inbox.take().is_none());
        assert!(report());
        inbox.forget_guest();
        assert!(report());
        assert!(inbox.take().is_some(), "a new guest is heard");
    }
}
