//! Who serves the pairs of a device: workers of this process, or the host's kernel.

use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MQ;

use super::config::Vhost;
use super::control::Control;
use super::kernel::{Engines, Supervisor};
use super::receive::Receiver;
use super::transmit::Transmitter;
use super::worker::{Pair, Queues, Worker};
use super::{Net, Running};
use crate::device::{ActivateError, Activation, ActiveQueue, ReconfigureError};
use crate::limit::{Limiter, Throttle};
use crate::ring::Ring;

/// How long who serves has to give the queues back. Nothing is ever in flight.
const PATIENCE: Duration = Duration::from_secs(1);

/// The queues of a pair, as the driver enabled them.
#[derive(Default)]
struct Part {
    pair: u16,
    receive: Option<ActiveQueue>,
    transmit: Option<ActiveQueue>,
    control: Option<ActiveQueue>,
}

/// Sorts queues into pairs. The control queue goes with the first.
fn pair_up(queues: Vec<ActiveQueue>, control: u16) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for queue in queues {
        let pair = if queue.index == control {
            0
        } else {
            queue.index / 2
        };
        let place = parts.iter().position(|part| part.pair == pair);
        let place = place.unwrap_or_else(|| {
            parts.push(Part {
                pair,
                ..Part::default()
            });
            parts.len() - 1
        });
        let Some(part) = parts.get_mut(place) else {
            continue;
        };
        let slot = if queue.index == control {
            &mut part.control
        } else if queue.index.is_multiple_of(2) {
            &mut part.receive
        } else {
            &mut part.transmit
        };
        *slot = Some(queue);
    }
    parts
}

fn throttle(limits: &Arc<Limiter>) -> Throttle {
    Throttle {
        own: Arc::clone(limits),
        group: None,
    }
}

impl Net {
    /// Has the host's kernel serve the pairs of a device that is not active, from when it is.
    pub(super) fn serve_by_kernel(&mut self, engines: Engines, vhost: Vhost) {
        self.engines = Some(Arc::new(engines));
        self.only_kernel = vhost == Vhost::On;
    }

    /// What has the kernel serve, where there is nothing to do that it cannot.
    fn kernel(&self) -> Option<&Arc<Engines>> {
        let engines = self.engines.as_ref()?;
        let limited = self.rx_limits.limited() || self.tx_limits.limited();
        let plain = !limited && !self.here && self.shared.link() && self.shared.mirror().is_none();
        plain.then_some(engines)
    }

    /// The queue of commands.
    fn control_queue(&self) -> u16 {
        let several = self.accepts(VIRTIO_NET_F_MQ);
        let last = if several { self.settings.pairs } else { 1 };
        last.saturating_mul(2)
    }

    /// Has queues served.
    pub(super) fn launch(
        &mut self,
        running: Running,
        queues: Vec<ActiveQueue>,
    ) -> Result<(), ActivateError> {
        // What a worker had to leave it has to take up again.
        let parked = queues.iter().any(|queue| !queue.parked.is_empty());
        let engines = self.kernel().filter(|_| !parked).cloned();
        match &engines {
            Some(engines) => self.launch_kernel(engines, &running, queues),
            None => self.launch_workers(&running, queues),
        }?;
        self.by_kernel = engines.is_some();
        self.running = Some(running);
        Ok(())
    }

    fn launch_kernel(
        &mut self,
        engines: &Arc<Engines>,
        running: &Running,
        queues: Vec<ActiveQueue>,
    ) -> Result<(), ActivateError> {
        let control = self.control_queue();
        let shared = &self.shared;
        let Running {
            features,
            memory,
            notifier,
        } = running;
        let mut wakes = Vec::new();
        self.workers.start(notifier, vec![queues], |queues, wake| {
            wakes.push(wake.clone());
            let activation = Activation {
                features: *features,
                memory: memory.clone(),
                queues,
                notifier: Arc::clone(notifier),
            };
            Supervisor::new(engines, shared, activation, control, wake)
        })?;
        self.shared.set_wakes(wakes);
        Ok(())
    }

    fn launch_workers(
        &mut self,
        running: &Running,
        queues: Vec<ActiveQueue>,
    ) -> Result<(), ActivateError> {
        let Running {
            features,
            memory,
            notifier,
        } = running;
        let features = *features;
        let shape = self.shape();
        let mut wakes = Vec::new();
        let ring = |queue: ActiveQueue| Ring::new(queue, features, Arc::clone(notifier));
        let parts = pair_up(queues, self.control_queue());
        self.workers.start(notifier, parts, |part, wake| {
            let Part {
                pair,
                receive,
                transmit,
                control,
            } = part;
            wakes.push(wake.clone());
            let queues = Queues {
                receiver: receive
                    .map(|queue| Receiver::new(ring(queue), shape, throttle(&self.rx_limits))),
                transmitter: transmit
                    .map(|queue| Transmitter::new(ring(queue), throttle(&self.tx_limits))),
                control: control
                    .map(|queue| Control::new(ring(queue), Arc::clone(&self.shared), features)),
            };
            let tally = self.tallies.of(pair);
            let clock = Arc::clone(&self.clock);
            let pair = Pair::new(pair, &self.shared, tally, clock, Arc::clone(notifier));
            Worker::new(pair, memory.clone(), queues, wake)
        })?;
        self.shared.set_wakes(wakes);
        Ok(())
    }

    /// Lets others serve, after a change, if they are to.
    pub(super) fn hand_over(&mut self) -> Result<(), ReconfigureError> {
        if self.running.is_none() || self.kernel().is_some() == self.by_kernel {
            return Ok(());
        }
        let stopped = self.workers.stop(Instant::now() + PATIENCE);
        let stopped = stopped.map_err(ReconfigureError::Busy)?;
        let Some(running) = self.running.take() else {
            return Ok(());
        };
        let notifier = Arc::clone(&running.notifier);
        let queues = stopped.into_iter().map(ActiveQueue::from).collect();
        self.launch(running, queues).map_err(|error| {
            notifier.needs_reset(&error.to_string());
            ReconfigureError::Broken(error)
        })
    }
}
