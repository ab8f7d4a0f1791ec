//! The memory balloon (Virtio 1.2, section 5.5): takes memory from the guest for the host, and gives it back.
//!
//! The monitor sets a target, and the guest's driver gives pages or takes them back
//! until it is there. What becomes of the pages is the host's side of guest memory
//! ([`crate::memory::Backing`]); [`pages`] gathers them for that.
//!
//! Besides, the guest reports pages that it does not use, which go back to the host until it
//! touches them (`free_page_reporting`), tells of free pages when asked, for whoever
//! copies its memory ([`BalloonView::take_hints`]), and says how its memory is used ([`BalloonView::statistics`]).
//!
//! A reset by the driver or of the machine empties the balloon. The target stays:
//! the next driver finds it and fills the balloon again.

mod pages;
mod spec;
mod view;
mod worker;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use devices::StopError;
use migration::{RestoreError, SaveError, SavedState, Snapshot, decode_exact};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use zerocopy::IntoBytes;

use self::pages::Partial;
pub use self::pages::{LargePagesV1, PartialPageV1};
use self::spec::{ACTUAL_OFFSET, ConfigSpace, HINT_DONE, HINT_FIRST, PAGE, POISON_OFFSET, feature};
use self::view::lock;
pub use self::view::{BalloonChange, BalloonView, GuestStatistics, HintChange, NoBalloon};
use self::worker::Worker;
use crate::device::{
    ActivateError, Activation, Counters, Identity, Notifier, StoppedQueue, VirtioDevice, read_space,
};
use crate::models::{BuildContext, BuildError, Model, parse};
use crate::schema::{Field, FieldKind};
use crate::worker::Workers;

/// The entry in the registry.
pub const MODEL: Model = Model {
    kind: "balloon",
    flag: "balloon",
    about: "a balloon, which takes memory from the guest and gives it back",
    fields: &[
        Field {
            name: "size",
            kind: FieldKind::Bytes,
            required: true,
            help: "how much memory the guest is to give up, less than it has; 0 for none yet",
        },
        Field {
            name: "deflate_on_oom",
            kind: FieldKind::Switch,
            required: false,
            help: "the guest may take memory back when it runs out (default off)",
        },
        Field {
            name: "free_page_reporting",
            kind: FieldKind::Switch,
            required: false,
            help: "memory that the guest does not use goes back to the host (default off)",
        },
        Field {
            name: "statistics_interval",
            kind: FieldKind::Number,
            required: false,
            help: "how often the guest says how its memory is used, in seconds (default 0: when asked)",
        },
    ],
    build,
};

/// A driver has one buffer of 256 pages, or 32 pieces of free memory, under way.
const QUEUE_SIZE: u16 = 128;

/// Once a day is the least that statistics are asked for.
const MAX_INTERVAL: u32 = 24 * 60 * 60;

/// The configuration of a balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// How many bytes the guest is to give up; a part of 4096 is left out.
    pub size: u64,
    /// The guest may take pages back by itself when it is out of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Pages that the guest does not use go back to the host until it touches them.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// How often the guest is asked for statistics, in seconds; 0: only when somebody wants them.
    #[serde(default)]
    pub statistics_interval: u32,
}

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let config: BalloonConfig = parse(MODEL.kind, config)?;
    if config.statistics_interval > MAX_INTERVAL {
        return Err(BuildError::Field {
            field: "statistics_interval",
            reason: format!(
                "{} seconds: give {MAX_INTERVAL} or less",
                config.statistics_interval
            ),
        });
    }
    if target_pages(config.size).is_none() {
        return Err(BuildError::Field {
            field: "size",
            reason: format!("{} bytes are more than a balloon can have", config.size),
        });
    }
    Ok(Box::new(Balloon::new(&context.id, &config)))
}

fn target_pages(size: u64) -> Option<u32> {
    u32::try_from(size / PAGE).ok()
}

/// A balloon.
pub struct Balloon {
    offered: u64,
    interval: Option<Duration>,
    view: Arc<BalloonView>,
    /// What the driver has accepted.
    features: u64,
    /// That the target was reached has been told: once, so that it is not for the guest to repeat.
    told: bool,
    /// It was restored with a round of hints under way, of which its driver is to hear that it has ended.
    cut: bool,
    /// While the device is active.
    notifier: Option<Arc<dyn Notifier>>,
    workers: Workers,
}

impl Balloon {
    /// Makes the balloon `id`, empty. A size that is no number of pages is the greatest there is.
    #[must_use]
    pub fn new(id: &str, config: &BalloonConfig) -> Self {
        let BalloonConfig {
            size,
            deflate_on_oom,
            free_page_reporting,
            statistics_interval,
        } = *config;
        // These make queues, and drivers disagree on the numbers of those that follow one that is
        // missing: only the last may be.
        let mut offered = feature::MUST_TELL_HOST
            | feature::STATS_VQ
            | feature::FREE_PAGE_HINT
            | feature::PAGE_POISON;
        if deflate_on_oom {
            offered |= feature::DEFLATE_ON_OOM;
        }
        if free_page_reporting {
            offered |= feature::PAGE_REPORTING;
        }
        let view = BalloonView::default();
        let pages = target_pages(size).unwrap_or(u32::MAX);
        view.target.store(pages, Ordering::Release);
        Self {
            offered,
            interval: (statistics_interval > 0)
                .then(|| Duration::from_secs(statistics_interval.into())),
            view: Arc::new(view),
            features: 0,
            told: pages == 0,
            cut: false,
            notifier: None,
            workers: Workers::new("balloon", id),
        }
    }

    fn config_space(&self) -> ConfigSpace {
        let load = |value: &std::sync::atomic::AtomicU32| value.load(Ordering::Acquire).into();
        ConfigSpace {
            num_pages: load(&self.view.target),
            actual: load(&self.view.actual),
            free_page_hint_cmd_id: load(&self.view.hint_command),
            poison_val: load(&self.view.poison),
        }
    }

    /// Tells once that a target has been reached.
    fn tell(&mut self) {
        let actual = self.view.actual();
        if actual == self.view.target()
            && !self.told
            && let Some(notifier) = &self.notifier
        {
            notifier.balloon_reached(actual);
            self.told = true;
        }
    }
}

impl VirtioDevice for Balloon {
    fn identity(&self) -> Identity {
        let queues = if self.offered & feature::PAGE_REPORTING == 0 {
            4
        } else {
            5
        };
        Identity {
            device_type: spec::DEVICE_TYPE,
            features: self.offered,
            queue_sizes: vec![QUEUE_SIZE; queues],
            pci_class: [0xff, 0, 0],
        }
    }

    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(Arc::clone(&self.view) as _)
    }

    fn balloon(&self) -> Option<Arc<BalloonView>> {
        Some(Arc::clone(&self.view))
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(self.config_space().as_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut space = self.config_space();
        let poison = self.features & feature::PAGE_POISON != 0;
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            let field = |from: u64| from..from + 4;
            let writable =
                field(ACTUAL_OFFSET).contains(&at) || poison && field(POISON_OFFSET).contains(&at);
            let place = usize::try_from(at).ok();
            if writable && let Some(to) = place.and_then(|at| space.as_mut_bytes().get_mut(at)) {
                *to = *byte;
            }
        }
        let view = &self.view;
        view.actual.store(space.actual.get(), Ordering::Release);
        let poison = space.poison_val.get();
        view.poison.store(poison, Ordering::Release);
        self.tell();
    }

    fn features_negotiated(&mut self, features: u64) {
        self.features = features;
    }

    fn change_balloon(&mut self, change: BalloonChange) -> Result<(), NoBalloon> {
        match change {
            BalloonChange::Target(size) => {
                let pages = target_pages(size).unwrap_or(u32::MAX);
                self.told = false;
                self.view.target.store(pages, Ordering::Release);
                self.tell();
            }
            BalloonChange::Hints(change) => self.view.change_hints(change),
        }
        Ok(())
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            memory,
            queues,
            notifier,
        } = activation;
        let (view, interval) = (Arc::clone(&self.view), self.interval);
        self.workers
            .start(&notifier, vec![queues], |queues, wake| {
                *lock(&view.wake) = Some(wake.clone());
                let hands = (&notifier, wake);
                let memory = memory.clone();
                Worker::new(queues, features, memory, &view, interval, hands).map_err(|error| {
                    ActivateError {
                        what: "the balloon's worker",
                        reason: error.to_string(),
                    }
                })
            })?;
        self.view
            .hints_heard(features & feature::FREE_PAGE_HINT != 0);
        if std::mem::take(&mut self.cut) {
            notifier.config_changed();
        }
        self.notifier = Some(notifier);
        Ok(())
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        let stopped = self.workers.stop(deadline);
        if !matches!(stopped, Err(StopError::Deadline { .. })) {
            self.notifier = None;
            self.view.hints_heard(false);
            *lock(&self.view.wake) = None;
        }
        stopped
    }

    fn reset(&mut self) {
        self.features = 0;
        self.cut = false;
        self.view.reset();
    }
}

/// The saved state of a balloon.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonV1 {
    /// How many pages it is to have.
    pub num_pages: u32,
    /// How many the driver says it has.
    pub actual: u32,
    /// What the driver fills free pages with.
    pub poison_val: u32,
    /// What the driver is to do about hints.
    pub hint_command: u32,
    /// That the target was reached has been told.
    pub told: bool,
    /// What has begun of the host's pages that are larger than the balloon's.
    pub large: LargePagesV1,
}

/// The saved state of a balloon that counts its rounds of hints.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonV2 {
    /// How many pages it is to have.
    pub num_pages: u32,
    /// How many the driver says it has.
    pub actual: u32,
    /// What the driver fills free pages with.
    pub poison_val: u32,
    /// What the driver is to do about hints.
    pub hint_command: u32,
    /// How many rounds of hints there have been.
    pub hint_rounds: u32,
    /// That the target was reached has been told.
    pub told: bool,
    /// What has begun of the host's pages that are larger than the balloon's.
    pub large: LargePagesV1,
}

impl From<BalloonV1> for BalloonV2 {
    fn from(saved: BalloonV1) -> Self {
        let BalloonV1 {
            num_pages,
            actual,
            poison_val,
            hint_command,
            told,
            large,
        } = saved;
        let rounds = hint_command.checked_sub(HINT_FIRST);
        Self {
            num_pages,
            actual,
            poison_val,
            hint_command,
            hint_rounds: rounds.map_or(0, |last| last.saturating_add(1)),
            told,
            large,
        }
    }
}

impl SavedState for BalloonV2 {
    const SCHEMA: &'static str = "virtio-balloon";
    const VERSION: u16 = 2;

    fn upgrade(found: u16, body: &[u8]) -> Result<Self, RestoreError> {
        match found {
            1 => decode_exact::<BalloonV1>(Self::SCHEMA, found, body).map(Self::from),
            Self::VERSION => decode_exact(Self::SCHEMA, found, body),
            _ => Err(RestoreError::Version {
                schema: Self::SCHEMA,
                found,
                newest: Self::VERSION,
            }),
        }
    }
}

impl Snapshot for Balloon {
    type State = BalloonV2;

    fn save(&self) -> Result<BalloonV2, SaveError> {
        let ConfigSpace {
            num_pages,
            actual,
            free_page_hint_cmd_id,
            poison_val,
        } = self.config_space();
        // What the driver has not been told yet it is to be told by the next.
        let hint_command = if self.cut {
            HINT_FIRST
        } else {
            free_page_hint_cmd_id.get()
        };
        Ok(BalloonV2 {
            num_pages: num_pages.get(),
            actual: actual.get(),
            poison_val: poison_val.get(),
            hint_command,
            hint_rounds: self.view.rounds(),
            told: self.told,
            large: lock(&self.view.partial).save(),
        })
    }

    fn restore(&mut self, state: BalloonV2) -> Result<(), RestoreError> {
        let BalloonV2 {
            num_pages,
            actual,
            poison_val,
            hint_command,
            hint_rounds,
            told,
            large,
        } = state;
        let view = &self.view;
        let Some(partial) = Partial::restored(large) else {
            return Err(RestoreError::Invalid {
                schema: BalloonV2::SCHEMA,
                reason: "its larger pages are in no order".to_owned(),
            });
        };
        *lock(&view.partial) = partial;
        view.target.store(num_pages, Ordering::Release);
        view.actual.store(actual, Ordering::Release);
        view.poison.store(poison_val, Ordering::Release);
        // Who asked for hints was the other machine, and what it was told is gone. The driver waits to hear so.
        self.cut = hint_command >= HINT_FIRST;
        let command = if self.cut { HINT_DONE } else { hint_command };
        view.hint_command.store(command, Ordering::Release);
        view.set_rounds(hint_rounds);
        self.told = told;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
