//! A machine that is given away, and how.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use migration::pages::PageSet;
use migration::transport::channel::RamSource;
use migration::transport::frame::Preamble;
use migration::transport::message::Offer;
use migration::transport::pages::Codec;
use migration::transport::precopy::Parameters;
use migration::transport::protocol::Outcome;
use migration::transport::samples::Samples;

use super::link::Link;
use super::storage::leaving::Leaving;
use crate::error::chain;

/// What became of an attempt to take locks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakenBack {
    /// All are here, and the images are as they were.
    Same,
    /// All are here, and somebody has had an image meanwhile, as far as can be told.
    Touched,
    /// Somebody has one, and none is here.
    Busy,
}

/// The machine, as who gives it away sees it. Each call may wait for the control thread; an error names what failed, or that the machine has ended.
pub trait Departing: Send {
    /// Its memory.
    fn ram(&self) -> &dyn RamSource;

    /// What has been written of it since the last call.
    ///
    /// # Errors
    ///
    /// Why that is not known.
    fn take_written(&self) -> Result<PageSet, String>;

    /// Pages that need not go unless they are written, because nobody cares what they hold. Asked for before the first round; the guest has some time to answer,
    /// and is not asked any more when this returns. What has been written of them meanwhile tells [`Departing::take_written`].
    fn free_pages(&mut self) -> PageSet {
        PageSet::new(&self.ram().ranges())
    }

    /// Memory is about to be gone through, after so many times that it has been.
    fn round_begins(&mut self, _before: u32) {}

    /// Adds to the offer what becomes of disks that are copied. The machine may be working on them.
    ///
    /// # Errors
    ///
    /// Why one cannot be copied.
    fn offer_disks(&mut self, _offer: &mut Offer) -> Result<(), String> {
        Ok(())
    }

    /// Has those disks tell from now on what is changed, in the order of the offer, until [`Departing::end`].
    ///
    /// # Errors
    ///
    /// Why one does not.
    fn follow_disks(&mut self) -> Result<Vec<Leaving>, String> {
        Ok(Vec::new())
    }

    /// Slows the guest by so many percent.
    fn throttle(&self, percent: u8);

    /// Stops vCPUs and devices, and gives the state of all but memory. Fails without having paused.
    ///
    /// # Errors
    ///
    /// Why it runs on.
    fn pause(&mut self) -> Result<Vec<u8>, String>;

    /// Takes note that from here on the destination may run it, and gives up the locks of all disks, whose queues have ended.
    ///
    /// # Errors
    ///
    /// Why they are all here still.
    fn let_go(&mut self) -> Result<(), String>;

    /// What the images hold that the destination is to reach too, in a few places, after [`Departing::let_go`].
    fn samples(&self) -> Vec<Samples> {
        Vec::new()
    }

    /// Takes the locks again. The disks are not written to before [`Departing::resume`].
    ///
    /// # Errors
    ///
    /// Why none has been taken.
    fn take_back(&mut self) -> Result<TakenBack, String>;

    /// Gives up again what [`Departing::take_back`] has taken.
    fn give_up(&mut self);

    /// It is this side's, with all locks, and goes on.
    fn resume(&mut self);

    /// It is at the destination, or not wanted: it ends here.
    fn end(&mut self, why: Outcome);
}

/// Makes a connection of the migration.
pub type Connect = Box<dyn Fn() -> std::io::Result<Link> + Send>;

/// What is wanted of a migration.
pub struct Plan {
    /// Limits.
    pub parameters: Parameters,
    /// Over how many connections memory goes.
    pub streams: u16,
    /// How pages go.
    pub codec: Codec,
    /// Bytes of memory for differences, on all streams together.
    pub cache: usize,
    /// Whether the guest is asked for pages that need not go.
    pub hints: bool,
    /// Names this migration.
    pub session: [u8; 16],
    /// Memory, where that is handed over and not sent.
    pub memory: Option<Arc<File>>,
    /// The bytes of disks that are copied.
    pub storage: u64,
    /// Where certificates are.
    pub tls: Option<PathBuf>,
    /// What is offered.
    pub offer: Offer,
}

/// Hands memory over, by a connection of its own: the connection, which is to stay until the machine has been built there.
pub(super) fn hand_over(connect: &Connect, session: [u8; 16], file: &File) -> Result<Link, String> {
    let mut link = connect().map_err(|error| error.to_string())?;
    let preamble = Preamble {
        session,
        stream: 0,
        streams: 1,
        again: true,
        disks: false,
    };
    preamble.write(&mut link).map_err(|error| chain(&error))?;
    let sent = link.send_descriptor(file.as_fd());
    sent.map_err(|error| error.to_string())?;
    Ok(link)
}
