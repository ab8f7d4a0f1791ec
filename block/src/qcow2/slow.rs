//! What a queue does not do itself: requests that have to wait for tables, for copying or for
//! (de)compression. A few threads per image run the image's blocking calls for them.

use std::io;
use std::sync::Arc;

use super::image::Qcow2;
use crate::buffers::Buffers;
use crate::crew::{Mailbox, Task};
use crate::disk::Op;
use crate::engine::bounce::AlignedBuf;
use crate::events::Events;
use crate::image::{Image, Kept};

/// The most bytes that one thread holds of a request at a time.
const CHUNK: u64 = 1 << 20;

/// A request for a thread.
#[derive(Debug)]
pub(crate) struct Slow {
    /// The image.
    pub image: Arc<Qcow2>,
    /// Who hears of writes past a threshold.
    pub events: Arc<Events>,
    /// Only load the tables that the request needs: the queue begins it again then.
    pub load: bool,
    /// The operation.
    pub op: Op,
    /// Guest offset in bytes.
    pub offset: u64,
    /// The data of a read or write.
    pub buffers: Buffers,
    /// A change is made durable.
    pub durable: bool,
    /// The queue's mark.
    pub slot: usize,
    /// Where the answer goes.
    pub reply: Arc<Mailbox<Reply>>,
}

/// How a request has ended.
#[derive(Debug)]
pub(crate) struct Reply {
    /// The queue's mark.
    pub slot: usize,
    /// Success, or why not.
    pub result: io::Result<()>,
    /// How many bytes were read or written.
    pub bytes: u64,
}

impl Task for Slow {
    fn run(self) {
        let mut bytes = 0;
        let result = self.perform(&mut bytes);
        // Before the answer: who has it may take the memory away.
        let Self {
            slot,
            reply,
            image,
            events,
            buffers,
            ..
        } = self;
        drop((buffers, events, image));
        reply.put(Reply {
            slot,
            result,
            bytes,
        });
    }
}

impl Slow {
    fn perform(&self, bytes: &mut u64) -> io::Result<()> {
        let image = &*self.image;
        if self.load {
            return image.load(self.offset, self.buffers.len(), self.op == Op::Read);
        }
        let changed = match self.op {
            Op::Read => {
                return self.in_chunks(bytes, |at, buf, part| {
                    image.read(at, buf.bytes_mut())?;
                    part.copy_from(buf.bytes());
                    Ok(())
                });
            }
            Op::Flush => return image.flush(),
            Op::Write => {
                self.in_chunks(bytes, |at, buf, part| {
                    part.copy_to(buf.bytes_mut());
                    image.write(at, buf.bytes())
                })?;
                self.buffers.len()
            }
            Op::Discard { len } => {
                image.discard(self.offset, len)?;
                0
            }
            Op::WriteZeroes { len, may_unmap } => {
                image.write_zeroes(self.offset, len, may_unmap)?;
                len
            }
        };
        self.tell(changed)?;
        if self.durable {
            image.flush()?;
        }
        Ok(())
    }

    /// Moves the data a part at a time, counting what has been moved.
    fn in_chunks(
        &self,
        done: &mut u64,
        mut each: impl FnMut(u64, &mut AlignedBuf, &Buffers) -> io::Result<()>,
    ) -> io::Result<()> {
        let len = self.buffers.len();
        while *done < len {
            let part = self.buffers.slice(*done, CHUNK);
            let size = usize::try_from(part.len()).map_err(io::Error::other)?;
            let mut buf = AlignedBuf::new(size)?;
            each(self.offset.saturating_add(*done), &mut buf, &part)?;
            *done += part.len();
        }
        Ok(())
    }

    /// Compares where a change has landed with the threshold, if there is one.
    fn tell(&self, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len && self.events.threshold().is_some() {
            let extent = self.image.extent(self.offset + done, len - done)?;
            if let Kept::Data { host: Some(host) } | Kept::Zero { host: Some(host) } = extent.kept {
                self.events.writes_to(host.saturating_add(extent.len));
            }
            done += extent.len;
        }
        Ok(())
    }
}
