//! Where a monitor's migration can be seen and steered from any thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::wire::{MigrationInfo, MigrationOrder};
use api::{ControlError, ErrorKind};

/// A migration, under way or ended.
pub trait Migration: Send + Sync {
    /// How far it is.
    fn info(&self) -> MigrationInfo;

    /// Tells it something. Never blocks.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Conflict`] where it is too late or too early for that, [`ErrorKind::Invalid`].
    fn order(&self, order: MigrationOrder) -> Result<(), ControlError>;
}

/// The migration of a monitor that is under way, or the last one. Clones share it.
#[derive(Clone, Default)]
pub struct Board(Arc<Mutex<Option<Arc<dyn Migration>>>>);

impl Board {
    /// Begins one, unless another is under way.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`].
    pub fn begin(&self, migration: Arc<dyn Migration>) -> Result<(), ControlError> {
        let mut last = self.lock();
        if last
            .as_ref()
            .is_some_and(|last| !last.info().phase.is_end())
        {
            let message = "another migration is under way: wait for its end or cancel it";
            return Err(ControlError::new(ErrorKind::Busy, message));
        }
        *last = Some(migration);
        Ok(())
    }

    /// How far it is.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] where there has been none.
    pub fn info(&self) -> Result<MigrationInfo, ControlError> {
        Ok(self.find()?.info())
    }

    /// Tells it something.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] where there has been none, and what [`Migration::order`] says.
    pub fn order(&self, order: MigrationOrder) -> Result<(), ControlError> {
        self.find()?.order(order)
    }

    fn find(&self) -> Result<Arc<dyn Migration>, ControlError> {
        let last = self.lock().clone();
        last.ok_or_else(|| {
            let message = "this monitor has neither sent nor received a machine";
            ControlError::new(ErrorKind::NotFound, message)
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<dyn Migration>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use api::wire::MigrationPhase;

    use super::*;

    /// One that is as it is, and takes no orders.
    struct Still(MigrationInfo);

    impl Migration for Still {
        fn info(&self) -> MigrationInfo {
            self.0.clone()
        }

        fn order(&self, _: MigrationOrder) -> Result<(), ControlError> {
            Err(ControlError::new(ErrorKind::Conflict, "it is too late"))
        }
    }

    fn still(phase: MigrationPhase) -> Arc<Still> {
        Arc::new(Still(MigrationInfo {
            phase,
            ..MigrationInfo::default()
        }))
    }

    #[test]
    fn there_is_one_at_a_time_and_the_last_one_is_remembered() {
        let board = Board::default();
        let cancel = || board.order(MigrationOrder::Cancel).unwrap_err().kind;
        assert_eq!(cancel(), ErrorKind::NotFound);
        assert_eq!(board.info().unwrap_err().kind, ErrorKind::NotFound);
        for phase in [MigrationPhase::Failed, MigrationPhase::InDoubt] {
            board.begin(still(phase)).unwrap();
            assert_eq!(board.info().unwrap().phase, phase);
        }
        let busy = board.begin(still(MigrationPhase::Connecting));
        assert_eq!(busy.unwrap_err().kind, ErrorKind::Busy);
        assert_eq!(board.info().unwrap().phase, MigrationPhase::InDoubt);
        assert_eq!(cancel(), ErrorKind::Conflict);
    }
}
