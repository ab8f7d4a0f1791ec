//! The control queue of a card whose frames another program moves: how many pairs of queues are used, and whether the
//! driver has announced itself. The program does not see it.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ,
};
use vm_memory::GuestAddressSpace;

use std::time::Duration;

use super::bit;
use crate::device::{ActivateError, Activation, StoppedQueue};
use crate::memory::GuestMemory;
use crate::models::net::control::{Commands, Control};
use crate::ring::Ring;
use crate::vhost::Steering;
use crate::worker::{QueueWorker, Sleeper, Turn, Wake};

/// What the driver's commands do.
pub(super) struct Orders {
    /// The way to the worker of the pairs.
    pub steering: Steering,
    /// The features that the driver has accepted.
    pub features: u64,
    /// How many pairs there are.
    pub pairs: u16,
}

impl Orders {
    fn accepts(&self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }

    fn announced(&self, data: &[u8]) -> bool {
        let known = data.is_empty() && self.accepts(VIRTIO_NET_F_GUEST_ANNOUNCE);
        if known {
            self.steering.greet();
        }
        known
    }

    fn set_pairs(&self, data: &[u8]) -> bool {
        let Ok(pairs) = data.try_into().map(u16::from_le_bytes) else {
            return false;
        };
        let known = self.accepts(VIRTIO_NET_F_MQ) && (1..=self.pairs).contains(&pairs);
        if known {
            self.steering.serve(pairs.saturating_mul(2));
        }
        known
    }
}

impl Commands for Orders {
    fn carry_out(&mut self, class: u32, command: u32, data: &[u8]) -> bool {
        match (class, command) {
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => self.announced(data),
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => self.set_pairs(data),
            _ => false,
        }
    }
}

/// The worker of the control queue.
pub(super) struct Clerk {
    control: Control<Orders>,
    memory: GuestMemory,
    sleeper: Sleeper,
}

impl Clerk {
    /// Serves the one queue of `activation`.
    ///
    /// # Errors
    ///
    /// [`ActivateError`] when the host lacks descriptors, or there is no queue.
    pub fn new(activation: Activation, orders: Orders, wake: &Wake) -> Result<Self, ActivateError> {
        let failed = |reason: String| ActivateError {
            what: "the control queue",
            reason,
        };
        let Activation {
            features,
            memory,
            queues,
            notifier,
        } = activation;
        let queue = queues.into_iter().next();
        let queue = queue.ok_or_else(|| failed("there is none".to_owned()))?;
        let ring = Ring::new(queue, features, notifier);
        let sleeper = Sleeper::new(&ring, wake).map_err(|error| failed(error.to_string()))?;
        Ok(Self {
            control: Control::with(ring, orders),
            memory,
            sleeper,
        })
    }

    /// Carries out the driver's commands; `true` when there may be more.
    fn command(&mut self) -> bool {
        let control = &mut self.control;
        if control.ring.failed() {
            return false;
        }
        let view = self.memory.memory();
        let served = control.serve(&view);
        let served = served.and_then(|more| control.ring.notify(&view).map(|()| more));
        served
            .map_err(|error| control.ring.fail(&error))
            .unwrap_or(false)
    }
}

impl QueueWorker for Clerk {
    fn turn(&mut self, serve: bool) -> Turn {
        let more = serve && self.command();
        let most = more.then_some(Duration::ZERO);
        match self.sleeper.sleep_up_to(&mut self.control.ring, most) {
            Ok(()) => Turn::Again,
            Err(error) => {
                self.control.ring.fail(&error);
                Turn::Halt
            }
        }
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn finish(mut self) -> Vec<StoppedQueue> {
        let ring = &mut self.control.ring;
        // Whoever goes on with the queue may wait for a kick first.
        if !ring.failed() {
            let _ = ring.invite(&self.memory.memory());
        }
        vec![self.control.ring.stop([])]
    }
}
