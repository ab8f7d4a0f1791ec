//! What the program notes down of the chains that it has.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::request;

/// A record of the chains that the program has, for its successor: for each head of each queue what has become of
/// it, and when it was taken.
pub struct Record {
    file: File,
    size: u16,
}

/// What a record says of a chain.
pub const TAKEN: u8 = 1;
pub const DONE: u8 = 2;

impl Record {
    pub fn new(queues: u16, size: u16) -> Self {
        let memory = rustix::fs::memfd_create("record", rustix::fs::MemfdFlags::CLOEXEC);
        let file = File::from(memory.unwrap());
        let record = Self { file, size };
        record
            .file
            .set_len(RECORD_AT + record.place(u32::from(queues), 0))
            .unwrap();
        record
    }

    /// One that is long enough, and in a file that is no memory.
    pub fn on_disk(size: u16) -> Self {
        let file = File::open(std::env::current_exe().unwrap()).unwrap();
        Self { file, size }
    }

    /// That of a predecessor.
    pub fn in_file(file: File, size: u16) -> Self {
        Self { file, size }
    }

    fn place(&self, queue: u32, head: u16) -> u64 {
        4 * (u64::from(queue) * u64::from(self.size) + u64::from(head))
    }

    /// Answers with the record, told as it is or otherwise: length, offset, queues and their size.
    pub fn give(&self, socket: &UnixStream, told: Option<(u64, u64, u16, u16)>) -> bool {
        let truth = || {
            let len = self.file.metadata().unwrap().len() - RECORD_AT;
            let queues = u16::try_from(len / self.place(1, 0)).unwrap();
            (len, RECORD_AT, queues, self.size)
        };
        let (len, offset, queues, size) = told.unwrap_or_else(truth);
        let header = [request::GET_INFLIGHT_FD, 1 | 1 << 2, 24];
        let mut answer: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        answer.extend([len, offset].iter().flat_map(|long| long.to_ne_bytes()));
        let shorts = [queues, size, 0, 0];
        answer.extend(shorts.iter().flat_map(|short| short.to_ne_bytes()));
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        let files = [self.file.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        let parts = [IoSlice::new(&answer)];
        sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL).is_ok()
    }

    pub fn set(&self, queue: u32, head: u16, what: u8, order: u16) {
        let [low, high] = order.to_le_bytes();
        let at = RECORD_AT + self.place(queue, head);
        self.file.write_all_at(&[what, low, high, 0], at).unwrap();
    }

    /// The chains of a queue that are in this state, in order.
    pub fn all(&self, queue: u32, wanted: u8) -> Vec<u16> {
        let mut found = Vec::new();
        for head in 0..self.size {
            let mut bytes = [0; 4];
            let at = RECORD_AT + self.place(queue, head);
            self.file.read_exact_at(&mut bytes, at).unwrap();
            let [what, low, high, _] = bytes;
            if what == wanted {
                found.push((u16::from_le_bytes([low, high]), head));
            }
        }
        found.sort_unstable();
        found.into_iter().map(|(_, head)| head).collect()
    }
}

/// Where in its file a record is.
pub const RECORD_AT: u64 = 64;
