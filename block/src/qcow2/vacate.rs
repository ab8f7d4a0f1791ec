//! What is done to an image's header and tables when the chain that it is in changes: another backing file, and nothing of its own any
//! more.

use super::image::Qcow2;
use super::session::{ChangeError, Part};
use crate::options::Format;

impl Qcow2 {
    /// Has the header name another backing file, or none, in one write, durably. What is opened stays as it is.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the header is as it was then.
    pub(crate) fn name_backing(&self, base: Option<(&str, Format)>) -> Result<(), ChangeError> {
        let mut session = self.session()?;
        let mut header = session.meta.header.clone();
        header.backing = base.map(|(name, _)| name.into());
        header.backing_format = base.map(|(_, format)| format.name().to_owned());
        session.switch(header, Part::Whole)?;
        session.finish();
        Ok(())
    }

    /// Empties the image, in one write, durably, so that its backing file shows through: the one that it has, or another that it
    /// then names. No request is under way. What it held is for [`Qcow2::free_all`].
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the image is as it was then.
    pub(crate) fn vacate(&self, base: Option<(&str, Format)>) -> Result<Vec<u64>, ChangeError> {
        let mut session = self.exclusive()?;
        session.commit()?;
        session.arm_bitmaps()?;
        let mut header = session.meta.header.clone();
        if let Some((name, format)) = base {
            header.backing = Some(name.into());
            header.backing_format = Some(format.name().to_owned());
        }
        let (old, entries) = (header.l1_offset, session.meta.l1.len());
        let mut run = None;
        if entries != 0 {
            let new = session.put(vec![0; entries * 8])?;
            header.l1_offset = session.offset(new);
            run = Some(new);
        }
        let switched = session
            .commit()
            .and_then(|()| session.switch(header, Part::Whole));
        if let Err(error) = switched {
            run.into_iter().for_each(|run| session.give_back(run));
            return Err(error.into());
        }
        session.free_range(old, entries as u64 * 8);
        let size = session.meta.header.size;
        session.meta.shared.recorder.note(0, size);
        Ok(std::mem::replace(&mut session.meta.l1, vec![0; entries]))
    }

    /// Frees what an image held that has been emptied.
    pub(crate) fn free_all(&self, before: &[u64]) {
        let freed = self.session().and_then(|mut session| {
            session.drop_tree(before)?;
            session.finish();
            Ok(())
        });
        if let Err(error) = freed {
            tracing::warn!(%error, "the space of an emptied image was not given back");
        }
    }
}
