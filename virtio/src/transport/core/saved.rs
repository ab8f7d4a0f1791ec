//! Saving and restoring a [`Core`].

use std::sync::atomic::Ordering;

use migration::{RestoreError, SaveError, Section};
use virtio_queue::QueueT;

use super::{Core, Idle, Signals, status};
use crate::transport::signals::{ISR_BITS, NO_VECTOR};
use crate::transport::state::{ProgressV1, QueueV1, invalid, restore_progress};

/// The fields of [`crate::transport::VirtioPciV1`] that are the core's.
pub(in crate::transport) struct CoreState {
    pub status: u8,
    pub isr: u8,
    pub generation: u8,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub queue_select: u16,
    pub config_vector: u16,
    pub queues: Vec<QueueV1>,
}

impl Core {
    pub fn save(&self) -> CoreState {
        let vectors = &self.signals.queue_vectors;
        let queues = self.slots.iter().zip(vectors).map(|(slot, vector)| {
            let progress = slot.idle.as_ref().map(|idle| ProgressV1 {
                next_avail: idle.queue.next_avail(),
                next_used: idle.queue.next_used(),
                parked: idle.parked.clone(),
            });
            QueueV1 {
                max_size: slot.max_size,
                size: slot.size,
                enabled: slot.enabled,
                desc: slot.desc,
                avail: slot.avail,
                used: slot.used,
                vector: vector.load(Ordering::Acquire),
                progress,
            }
        });
        CoreState {
            status: self.status(),
            isr: self.signals.isr.load(Ordering::Acquire),
            generation: self.signals.generation.load(Ordering::Acquire),
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            config_vector: self.signals.config_vector.load(Ordering::Acquire),
            queues: queues.collect(),
        }
    }

    pub fn device_schema(&self) -> &'static str {
        self.device.schema()
    }

    pub fn save_device(&self, name: &str) -> Result<Section, SaveError> {
        self.device.save_section(name)
    }

    /// Adopts saved registers and the model's section. After an error the
    /// unit is to be reset or dropped.
    pub fn restore(&mut self, state: CoreState, device: &Section) -> Result<(), RestoreError> {
        self.power_on();
        let CoreState {
            status: found,
            isr,
            generation,
            device_feature_select,
            driver_feature_select,
            driver_features,
            queue_select,
            config_vector,
            queues,
        } = state;
        self.driver_features = driver_features;
        self.check_status(found)?;
        if isr & !ISR_BITS != 0 {
            return Err(invalid(format!("ISR status {isr:#04x}")));
        }
        if queues.len() != self.slots.len() {
            return Err(invalid(format!(
                "{} queues are saved, this device has {}",
                queues.len(),
                self.slots.len()
            )));
        }
        let used = found & status::DRIVER_OK != 0;
        let broken = found & status::NEEDS_RESET != 0;
        for (index, saved) in queues.into_iter().enumerate() {
            self.restore_queue(index, saved, used, broken)?;
        }
        let signals = &self.signals;
        check_vector(signals, config_vector)?;
        signals
            .config_vector
            .store(config_vector, Ordering::Release);
        signals.isr.store(isr, Ordering::Release);
        signals.generation.store(generation, Ordering::Release);
        signals.needs_reset.store(broken, Ordering::Release);
        signals.driver_ok.store(used, Ordering::Release);
        self.status = found & !status::NEEDS_RESET;
        self.device_feature_select = device_feature_select;
        self.driver_feature_select = driver_feature_select;
        self.queue_select = queue_select;
        if found & status::FEATURES_OK != 0 {
            self.device.features_negotiated(driver_features);
        }
        self.device.restore_section(device)?;
        self.sync_doorbells();
        Ok(())
    }

    fn check_status(&self, found: u8) -> Result<(), RestoreError> {
        let features_ok = found & status::FEATURES_OK != 0;
        if found & !status::ALL != 0 || (found & status::DRIVER_OK != 0 && !features_ok) {
            return Err(invalid(format!("device status {found:#04x}")));
        }
        if features_ok && !self.accept_features() {
            return Err(invalid(format!(
                "the driver accepted the features {:#x}, this device offers {:#x}",
                self.driver_features, self.offered
            )));
        }
        Ok(())
    }

    fn restore_queue(
        &mut self,
        index: usize,
        saved: QueueV1,
        used_by_driver: bool,
        broken: bool,
    ) -> Result<(), RestoreError> {
        let QueueV1 {
            max_size,
            size,
            enabled,
            desc,
            avail,
            used,
            vector,
            progress,
        } = saved;
        let (Some(slot), Some(assigned)) = (
            self.slots.get_mut(index),
            self.signals.queue_vectors.get(index),
        ) else {
            return Ok(());
        };
        if max_size != slot.max_size || !size.is_power_of_two() || size > max_size {
            return Err(invalid(format!(
                "queue {index} has size {size} of {max_size}, this device has {}",
                slot.max_size
            )));
        }
        check_vector(&self.signals, vector)?;
        let in_use = used_by_driver && enabled;
        if progress.is_some() && !in_use || progress.is_none() && in_use && !broken {
            return Err(invalid(format!(
                "the progress of queue {index} does not fit the device's status"
            )));
        }
        assigned.store(vector, Ordering::Release);
        (slot.size, slot.enabled) = (size, enabled);
        (slot.desc, slot.avail, slot.used) = (desc, avail, used);
        if let Some(progress) = progress {
            let rings = slot.rings(self.driver_features);
            let (queue, parked) = restore_progress(index, rings, progress)?;
            slot.idle = Some(Idle { queue, parked });
        }
        Ok(())
    }
}

fn check_vector(signals: &Signals, vector: u16) -> Result<(), RestoreError> {
    if vector == NO_VECTOR || vector < signals.msix.count() {
        return Ok(());
    }
    Err(invalid(format!("MSI-X vector {vector}")))
}
