//! The device's registers and their rules, whatever the bus.
//!
//! # Reset
//!
//! Writing 0 to the status stops the model. It gets [`RESET_SLICE`] to drain;
//! a model with nothing in flight is done at once. When it is not, the status
//! stays as it was, every later access to it gives the model another slice, and
//! other writes are ignored meanwhile. A driver has to wait until it reads 0
//! (2.4.2), so it drives the reset to its end, no vCPU is held for long, and
//! no thread is needed.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use devices::StopError;
use serde_json::Value;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory as _, Permissions};

use super::doorbell::{Doorbells, Kick};
use super::gone::Gone;
use super::signals::{DeviceEvent, Signals};
use crate::device::{
    ActivateError, Activation, ActiveQueue, DiskImage, ExchangeError, Notifier, Preparation,
    Prepared, ReconfigureError, Reconfigured, ResizeError, VirtioDevice,
};
use crate::memory::{GuestMap, GuestMemory};
use crate::models::BuildContext;
use crate::models::balloon::{BalloonChange, NoBalloon};
use crate::models::mem::NoMemory;

mod saved;

pub(super) use saved::CoreState;

/// How long one access may wait for the model to drain.
pub(super) const RESET_SLICE: Duration = Duration::from_millis(10);

/// Device status bits (2.1).
mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
    /// What a driver may set in any order.
    pub const FREE: u8 = ACKNOWLEDGE | DRIVER | FAILED;
    pub const ALL: u8 = FREE | DRIVER_OK | FEATURES_OK | NEEDS_RESET;
}

/// Feature bits that are the transport's (chapter 6).
const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
const F_TRANSPORT: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// Offsets in the common configuration structure (4.1.4.3).
mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
    /// `queue_notify_data` and `queue_reset`, whose features are not offered,
    /// read as zero at the end.
    pub const LEN: u8 = 60;
}
/// Length of the common configuration structure in bytes.
pub(super) const COMMON_LEN: u8 = common::LEN;
/// A copy of that structure.
type CommonImage = [u8; common::LEN as usize];

/// A queue's registers, and its rings while nobody works on them.
struct Slot {
    max_size: u16,
    size: u16,
    enabled: bool,
    desc: u64,
    avail: u64,
    used: u64,
    idle: Option<Idle>,
    /// Where a doorbell is registered.
    doorbell: Option<u64>,
}

struct Idle {
    queue: Queue,
    parked: Vec<u16>,
}

impl Slot {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            desc: 0,
            avail: 0,
            used: 0,
            idle: None,
            doorbell: None,
        }
    }

    fn rings(&self, features: u64) -> QueueState {
        QueueState {
            max_size: self.max_size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: features & F_EVENT_IDX != 0,
            size: self.size,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        }
    }
}

/// What a [`Core`] is made of.
pub(super) struct Parts {
    pub device: Box<dyn VirtioDevice>,
    pub memory: GuestMemory,
    pub signals: Arc<Signals>,
    pub kicks: Arc<[Kick]>,
    pub doorbells: Arc<dyn Doorbells>,
    /// From the device's identity.
    pub features: u64,
    /// From the device's identity; as many as there are kicks.
    pub queue_sizes: Vec<u16>,
    /// Bytes from one queue's doorbell to the next.
    pub notify_multiplier: u64,
}

/// The registers of one device and the model behind them.
pub(super) struct Core {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    signals: Arc<Signals>,
    kicks: Arc<[Kick]>,
    doorbells: Arc<dyn Doorbells>,
    notify_multiplier: u64,
    /// Guest-physical address of queue 0's doorbell, while it is mapped.
    notify_base: Option<u64>,
    offered: u64,
    slots: Vec<Slot>,
    /// Without NEEDS_RESET, which is in the signals.
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    /// The unit has been started.
    running: bool,
    /// The model has the queues.
    active: bool,
    /// The driver has asked for a reset and the model has not drained yet.
    resetting: bool,
}

impl Core {
    pub fn new(parts: Parts) -> Self {
        let mut device = parts.device;
        let notifier: Arc<dyn Notifier> = Arc::clone(&parts.signals) as Arc<dyn Notifier>;
        device.attached(&notifier);
        Self {
            device,
            memory: parts.memory,
            signals: parts.signals,
            kicks: parts.kicks,
            doorbells: parts.doorbells,
            notify_multiplier: parts.notify_multiplier,
            notify_base: None,
            offered: parts.features | F_TRANSPORT,
            slots: parts.queue_sizes.into_iter().map(Slot::new).collect(),
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            running: false,
            active: false,
            resetting: false,
        }
    }

    /// Reads the common configuration structure; any width and offset.
    pub fn common_read(&mut self, offset: u64, data: &mut [u8]) {
        if covers(offset, data.len(), common::STATUS) {
            self.advance_reset();
        }
        let image = self.common_image();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(i as u64);
            *byte = usize::try_from(at)
                .ok()
                .and_then(|at| image.get(at).copied())
                .unwrap_or(0);
        }
    }

    fn common_image(&self) -> CommonImage {
        let mut image: CommonImage = [0; _];
        let mut put = |offset: u64, bytes: &[u8]| {
            let at = usize::try_from(offset).unwrap_or(usize::MAX);
            for (to, from) in image.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        let signals = &self.signals;
        let device_word = word(self.offered, self.device_feature_select);
        let driver_word = word(self.driver_features, self.driver_feature_select);
        let config_vector = signals.config_vector.load(Ordering::Acquire);
        let queues = u16::try_from(self.slots.len()).unwrap_or(u16::MAX);
        put(
            common::DEVICE_FEATURE_SELECT,
            &self.device_feature_select.to_le_bytes(),
        );
        put(common::DEVICE_FEATURE, &device_word.to_le_bytes());
        put(
            common::DRIVER_FEATURE_SELECT,
            &self.driver_feature_select.to_le_bytes(),
        );
        put(common::DRIVER_FEATURE, &driver_word.to_le_bytes());
        put(common::CONFIG_VECTOR, &config_vector.to_le_bytes());
        put(common::NUM_QUEUES, &queues.to_le_bytes());
        put(common::STATUS, &[self.status()]);
        put(
            common::GENERATION,
            &[signals.generation.load(Ordering::Acquire)],
        );
        put(common::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        let selected = usize::from(self.queue_select);
        // A queue that does not exist has size 0, and all its registers read as 0.
        if let (Some(slot), Some(vector)) = (
            self.slots.get(selected),
            signals.queue_vectors.get(selected),
        ) {
            put(common::QUEUE_SIZE, &slot.size.to_le_bytes());
            let vector = vector.load(Ordering::Acquire);
            put(common::QUEUE_VECTOR, &vector.to_le_bytes());
            put(common::QUEUE_ENABLE, &u16::from(slot.enabled).to_le_bytes());
            put(common::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(common::QUEUE_DESC, &slot.desc.to_le_bytes());
            put(common::QUEUE_DRIVER, &slot.avail.to_le_bytes());
            put(common::QUEUE_DEVICE, &slot.used.to_le_bytes());
        }
        image
    }

    fn status(&self) -> u8 {
        let broken = self.signals.needs_reset.load(Ordering::Acquire);
        self.status | if broken { status::NEEDS_RESET } else { 0 }
    }

    /// Writes the common configuration structure: fields whole, or halves of
    /// 64-bit fields; anything else is ignored (4.1.3.1).
    pub fn common_write(&mut self, offset: u64, data: &[u8]) {
        if offset == common::STATUS && data.len() == 1 {
            if let Some(status) = data.first() {
                self.write_status(*status);
            }
            return;
        }
        if self.resetting {
            return;
        }
        match *data {
            [a, b] => self.write16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write32(offset, u32::from_le_bytes([a, b, c, d])),
            [_, _, _, _, _, _, _, _] => {
                let (low, high) = data.split_at(4);
                if offset.is_multiple_of(8) && offset >= common::QUEUE_DESC {
                    self.common_write(offset, low);
                    self.common_write(offset.saturating_add(4), high);
                }
            }
            _ => {}
        }
    }

    fn write16(&mut self, offset: u64, value: u16) {
        let index = usize::from(self.queue_select);
        match offset {
            common::CONFIG_VECTOR => self.signals.assign(&self.signals.config_vector, value),
            common::QUEUE_SELECT => self.queue_select = value,
            common::QUEUE_VECTOR => {
                if let Some(vector) = self.signals.queue_vectors.get(index) {
                    self.signals.assign(vector, value);
                    if self.active {
                        self.device.vector_changed(self.queue_select);
                    }
                }
            }
            common::QUEUE_SIZE => {
                if let Some(slot) = self.open_slot()
                    && value.is_power_of_two()
                    && value <= slot.max_size
                {
                    slot.size = value;
                }
            }
            common::QUEUE_ENABLE if value == 1 => {
                if let Some(slot) = self.open_slot() {
                    slot.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn write32(&mut self, offset: u64, value: u32) {
        match offset {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            common::DRIVER_FEATURE if self.status & status::FEATURES_OK == 0 => {
                set_word(&mut self.driver_features, self.driver_feature_select, value);
            }
            common::QUEUE_DESC.. => {
                let high = u32::from(offset % 8 == 4);
                if let Some(slot) = self.open_slot() {
                    match offset & !4 {
                        common::QUEUE_DESC => set_word(&mut slot.desc, high, value),
                        common::QUEUE_DRIVER => set_word(&mut slot.avail, high, value),
                        common::QUEUE_DEVICE => set_word(&mut slot.used, high, value),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }

    /// The selected queue while its driver may still set it up: not enabled,
    /// and the device not yet in use.
    fn open_slot(&mut self) -> Option<&mut Slot> {
        if self.status & status::DRIVER_OK != 0 {
            return None;
        }
        let slot = self.slots.get_mut(usize::from(self.queue_select))?;
        (!slot.enabled).then_some(slot)
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.resetting = true;
        }
        self.advance_reset();
        if self.resetting || value == 0 {
            return;
        }
        // Bits that are set stay set until a reset (2.1.1).
        self.status |= value & status::FREE;
        let added = value & !self.status;
        if added & status::FEATURES_OK != 0 && self.accept_features() {
            self.status |= status::FEATURES_OK;
            self.device.features_negotiated(self.driver_features);
        }
        if added & status::DRIVER_OK != 0 && self.status & status::FEATURES_OK != 0 {
            self.status |= status::DRIVER_OK;
            self.signals.driver_ok.store(true, Ordering::Release);
            self.take_into_use();
        }
    }

    fn accept_features(&self) -> bool {
        self.driver_features & !self.offered == 0 && self.driver_features & F_VERSION_1 != 0
    }

    /// DRIVER_OK: makes queues of the registers, and hands them over.
    fn take_into_use(&mut self) {
        self.signals.event(DeviceEvent::Activated);
        for index in 0..self.slots.len() {
            if !self.slots[index].enabled {
                continue;
            }
            match Queue::try_from(self.slots[index].rings(self.driver_features)) {
                Ok(queue) => {
                    let parked = Vec::new();
                    self.slots[index].idle = Some(Idle { queue, parked });
                }
                Err(error) => {
                    self.signals.needs_reset(&format!("queue {index}: {error}"));
                    return;
                }
            }
        }
        self.sync_doorbells();
        self.activate();
    }

    /// Hands idle queues to the model, if everything is ready for it to work.
    fn activate(&mut self) {
        if !self.running
            || self.active
            || self.resetting
            || self.status & status::DRIVER_OK == 0
            || self.signals.needs_reset.load(Ordering::Acquire)
        {
            return;
        }
        let started = self.collect_queues().and_then(|queues| {
            self.device.start(Activation {
                features: self.driver_features,
                memory: self.memory.clone(),
                queues,
                notifier: Arc::clone(&self.signals) as Arc<dyn Notifier>,
            })
        });
        match started {
            Ok(()) => {
                self.active = true;
                // Kicks from before may have been lost: have every worker look.
                for (slot, kick) in self.slots.iter().zip(self.kicks.iter()) {
                    if slot.enabled {
                        kick.ring();
                    }
                }
            }
            Err(error) => self.signals.needs_reset(&error.to_string()),
        }
    }

    fn collect_queues(&mut self) -> Result<Vec<ActiveQueue>, ActivateError> {
        let map = self.memory.memory();
        let mut queues = Vec::new();
        for (index, (slot, kick)) in self.slots.iter_mut().zip(self.kicks.iter()).enumerate() {
            let Some(Idle { queue, parked }) = slot.idle.take() else {
                continue;
            };
            let fail = |reason| ActivateError {
                what: "a queue",
                reason: format!("queue {index}: {reason}"),
            };
            check_rings(&map, &queue).map_err(fail)?;
            let kick = kick
                .duplicate()
                .map_err(|error| fail(format!("its doorbell: {error}")))?;
            queues.push(ActiveQueue {
                index: u16::try_from(index).unwrap_or(u16::MAX),
                queue,
                kick,
                parked,
            });
        }
        Ok(queues)
    }

    /// Gives a reset that has been asked for another slice.
    fn advance_reset(&mut self) {
        if !self.resetting {
            return;
        }
        if self.active {
            match self.device.stop(Instant::now() + RESET_SLICE) {
                // The driver has given its queues up.
                Ok(_) => {}
                Err(StopError::Deadline { .. }) => return,
                Err(error @ StopError::WorkerLost { .. }) => {
                    if let Some(suppressed) = self.signals.log.allow() {
                        tracing::warn!(%error, suppressed, "reset without its worker");
                    }
                }
            }
            self.active = false;
        }
        self.power_on();
        self.signals.event(DeviceEvent::Reset);
    }

    /// Registers and model as after power-on. The model must be inactive.
    fn power_on(&mut self) {
        self.status = 0;
        self.resetting = false;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.signals.reset();
        self.sync_doorbells();
        for (slot, kick) in self.slots.iter_mut().zip(self.kicks.iter()) {
            *slot = Slot::new(slot.max_size);
            kick.clear();
        }
        self.device.reset();
    }

    /// As [`VirtioDevice::resize_disk`]; tells the driver. Both happen under
    /// the lock that a driver's look at the configuration takes, so that it
    /// sees another generation whenever it sees another size (2.5).
    pub fn resize_disk(&mut self, size: u64) -> Result<(), ResizeError> {
        self.device.resize_disk(size)?;
        self.signals.config_changed();
        Ok(())
    }

    /// As [`VirtioDevice::disk`].
    pub fn disk(&self) -> Option<Arc<dyn block::Disk>> {
        self.device.disk()
    }

    /// The features that are offered, and those that the driver has taken.
    pub fn features(&self) -> (u64, u64) {
        (self.offered, self.driver_features)
    }

    /// As [`VirtioDevice::exchange_disk`]. The driver sees no difference.
    pub fn exchange_disk(&mut self, image: DiskImage) -> Result<DiskImage, ExchangeError> {
        self.device.exchange_disk(image)
    }

    /// As [`VirtioDevice::change_balloon`]; tells the driver.
    pub fn change_balloon(&mut self, change: BalloonChange) -> Result<(), NoBalloon> {
        self.device.change_balloon(change)?;
        self.signals.config_changed();
        Ok(())
    }

    /// As [`VirtioDevice::request_memory`]; tells the driver.
    pub fn request_memory(&mut self, size: u64) -> Result<(), NoMemory> {
        self.device.request_memory(size)?;
        self.signals.config_changed();
        Ok(())
    }

    /// As [`VirtioDevice::prepare`].
    pub fn prepare(
        &self,
        patch: Value,
        context: BuildContext,
    ) -> Result<Preparation, ReconfigureError> {
        self.device.prepare(patch, context)
    }

    /// As [`VirtioDevice::reconfigure`]; tells the driver what it can see.
    pub fn reconfigure(&mut self, prepared: Prepared) -> Result<(), ReconfigureError> {
        if self.device.reconfigure(prepared)? == Reconfigured::Seen {
            self.signals.config_changed();
        }
        Ok(())
    }

    /// As [`VirtioDevice::serve_here`].
    pub fn serve_here(&mut self, here: bool) -> Result<(), ReconfigureError> {
        self.device.serve_here(here)
    }

    /// As [`VirtioDevice::bound_here`].
    pub fn bound_here(&self) -> Option<&'static str> {
        self.device.bound_here()
    }

    /// See [`VirtioDevice::renew`].
    pub fn renew(&mut self) {
        self.device.renew();
    }

    /// The doorbells begin at `base` now, or are not mapped.
    pub fn set_notify_base(&mut self, base: Option<u64>) {
        self.notify_base = base;
        self.sync_doorbells();
    }

    /// Registers the doorbells of enabled queues while the driver uses the
    /// device, and no others: setting up a device costs the host nothing.
    fn sync_doorbells(&mut self) {
        let base = self
            .notify_base
            .filter(|_| self.status & status::DRIVER_OK != 0);
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let Some(kick) = self.kicks.get(index) else {
                return;
            };
            let offset = (index as u64).saturating_mul(self.notify_multiplier);
            let wanted = base
                .filter(|_| slot.enabled)
                .and_then(|base| base.checked_add(offset));
            if slot.doorbell == wanted {
                continue;
            }
            let fd = std::os::fd::AsFd::as_fd(kick);
            let mut result = Ok(());
            if let Some(old) = slot.doorbell.take() {
                result = self.doorbells.unregister(old, fd);
            }
            if let Some(address) = wanted {
                let registered = self.doorbells.register(address, fd);
                slot.doorbell = registered.is_ok().then_some(address);
                result = result.and(registered);
            }
            if let Err(error) = result
                && let Some(suppressed) = self.signals.log.allow()
            {
                let device = self.signals.name.as_str();
                tracing::warn!(device, queue = index, %error, suppressed, "a doorbell takes the slow path");
            }
        }
    }

    /// Reads the device's own configuration.
    pub fn device_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    /// Writes the device's own configuration.
    pub fn device_write(&mut self, offset: u64, data: &[u8]) {
        if !self.resetting {
            self.device.write_config(offset, data);
        }
    }

    /// The unit starts.
    pub fn start(&mut self) {
        self.running = true;
        self.activate();
    }

    /// The unit stops: takes the queues back, and ends a reset that is under way.
    pub fn stop(&mut self, deadline: Instant) -> Result<(), StopError> {
        if self.active {
            let stopped = match self.device.stop(deadline) {
                Ok(stopped) => stopped,
                Err(error @ StopError::Deadline { .. }) => return Err(error),
                Err(error @ StopError::WorkerLost { .. }) => {
                    self.active = false;
                    self.signals.needs_reset("its worker has ended");
                    return Err(error);
                }
            };
            self.active = false;
            for queue in stopped {
                if let Some(slot) = self.slots.get_mut(usize::from(queue.index)) {
                    slot.idle = Some(Idle {
                        queue: queue.queue,
                        parked: queue.parked,
                    });
                }
            }
            if self.slots.iter().any(|s| s.enabled && s.idle.is_none()) {
                self.signals.needs_reset("a queue was not given back");
            }
        }
        self.running = false;
        self.advance_reset();
        Ok(())
    }

    /// Gives up the model for good, and with it the back end; the unit is
    /// stopped. To be dropped without the transport's lock.
    pub fn retire(&mut self) -> Box<dyn VirtioDevice> {
        self.running = false;
        self.active = false;
        std::mem::replace(&mut self.device, Box::new(Gone))
    }

    /// The machine resets. The unit is stopped; a model that is not is given a slice.
    pub fn reset(&mut self) {
        if self.active && self.device.stop(Instant::now() + RESET_SLICE).is_err() {
            let device = self.signals.name.as_str();
            tracing::error!(device, "reset while requests were in flight");
        }
        self.active = false;
        self.power_on();
    }
}

/// Whether an access touches the byte at `register`.
fn covers(offset: u64, len: usize, register: u64) -> bool {
    let range: Range<u64> = offset..offset.saturating_add(len as u64);
    range.contains(&register)
}

/// The 32-bit word of `value` that a select register names; zero past it.
fn word(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_word(value: &mut u64, select: u32, word: u32) {
    match select {
        0 => *value = *value >> 32 << 32 | u64::from(word),
        1 => *value = u64::from(word) << 32 | *value & 0xffff_ffff,
        _ => {}
    }
}

/// Whether all three parts of the queue lie in RAM (2.7 gives their sizes).
fn check_rings(map: &GuestMap, queue: &Queue) -> Result<(), String> {
    let size = usize::from(queue.size());
    let parts = [
        ("descriptor table", queue.desc_table(), 16 * size),
        ("available ring", queue.avail_ring(), 6 + 2 * size),
        ("used ring", queue.used_ring(), 6 + 8 * size),
    ];
    for (part, address, len) in parts {
        if !map.check_range(GuestAddress(address), len, Permissions::ReadWrite) {
            return Err(format!(
                "its {part} at {address:#x}, {len} bytes, is not all in RAM"
            ));
        }
    }
    Ok(())
}
