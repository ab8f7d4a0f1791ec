//! A device that writes back what it reads, with a back end that the test controls.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use devices::StopError;
use migration::{RestoreError, SaveError, SavedState, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio::device::{
    ActivateError, Activation, ActiveQueue, Identity, Notifier, Preparation, Prepared,
    ReconfigureError, Reconfigured, StoppedQueue, VirtioDevice,
};
use virtio::memory::GuestMemory;
use virtio::models::BuildContext;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::rig::PATIENCE;

pub const QUEUE_SIZE: u16 = 16;
pub const QUEUES: u16 = 2;
/// A device-specific feature.
pub const FEATURE: u64 = 1 << 3;
const LONGEST: u64 = 1 << 16;

/// What the back end does with requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Serves them.
    #[default]
    Serve,
    /// Takes them, completes none, and gives them back when stopped.
    Park,
    /// Takes them, and cannot stop while it has any.
    Stuck,
    /// The worker panics when it is stopped.
    Dying,
}

/// The test's hand on the back end.
#[derive(Default)]
pub struct EchoControl {
    mode: Mutex<Mode>,
    held: Mutex<usize>,
    held_changed: Condvar,
    pub notifier: Mutex<Option<Arc<dyn Notifier>>>,
}

impl EchoControl {
    pub fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }

    /// Waits until the back end holds a request.
    pub fn wait_held(&self) {
        let held = self.held.lock().unwrap();
        let (_held, timeout) = self
            .held_changed
            .wait_timeout_while(held, PATIENCE, |held| *held == 0)
            .unwrap();
        assert!(!timeout.timed_out(), "the back end holds nothing");
    }

    fn hold(&self) {
        *self.held.lock().unwrap() += 1;
        self.held_changed.notify_all();
    }

    fn mode(&self) -> Mode {
        *self.mode.lock().unwrap()
    }
}

#[derive(Serialize, Deserialize)]
pub struct EchoV1 {
    scratch: u32,
    served: u32,
}

impl SavedState for EchoV1 {
    const SCHEMA: &'static str = "virtio-echo";
    const VERSION: u16 = 1;
}

pub struct Echo {
    control: Arc<EchoControl>,
    scratch: u32,
    served: Arc<AtomicU32>,
    worker: Option<(EventFd, JoinHandle<Vec<StoppedQueue>>)>,
}

impl Echo {
    pub fn new(control: Arc<EchoControl>) -> Self {
        Self {
            control,
            scratch: 0,
            served: Arc::default(),
            worker: None,
        }
    }

    fn registers(&self) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&self.scratch.to_le_bytes());
        bytes[4..].copy_from_slice(&self.served.load(Ordering::SeqCst).to_le_bytes());
        bytes
    }
}

impl Snapshot for Echo {
    type State = EchoV1;

    fn save(&self) -> Result<EchoV1, SaveError> {
        Ok(EchoV1 {
            scratch: self.scratch,
            served: self.served.load(Ordering::SeqCst),
        })
    }

    fn restore(&mut self, state: EchoV1) -> Result<(), RestoreError> {
        let EchoV1 { scratch, served } = state;
        self.scratch = scratch;
        self.served.store(served, Ordering::SeqCst);
        Ok(())
    }
}

impl VirtioDevice for Echo {
    fn identity(&self) -> Identity {
        Identity {
            device_type: 0x7e,
            features: FEATURE,
            queue_sizes: vec![QUEUE_SIZE; QUEUES.into()],
            pci_class: [0xff, 0, 0],
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let registers = self.registers();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap() + i;
            *byte = registers.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (0, Ok(data)) = (offset, data.try_into()) {
            self.scratch = u32::from_le_bytes(data);
        }
    }

    /// A number becomes the scratch register, which the driver sees; all else it does not.
    fn prepare(&self, patch: Value, _: BuildContext) -> Result<Preparation, ReconfigureError> {
        Ok(Box::new(move || Ok(Prepared::new(patch))))
    }

    fn reconfigure(&mut self, prepared: Prepared) -> Result<Reconfigured, ReconfigureError> {
        match prepared.take::<Value>()?.as_u64() {
            Some(number) => {
                self.scratch = u32::try_from(number).unwrap();
                Ok(Reconfigured::Seen)
            }
            None => Ok(Reconfigured::Unseen),
        }
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        *self.control.notifier.lock().unwrap() = Some(Arc::clone(&activation.notifier));
        let worker = Worker {
            queues: activation.queues,
            memory: activation.memory,
            notifier: activation.notifier,
            control: Arc::clone(&self.control),
            served: Arc::clone(&self.served),
            stop: stop.try_clone().unwrap(),
            broken: false,
        };
        self.worker = Some((stop, std::thread::spawn(move || worker.run())));
        Ok(())
    }

    fn stop(&mut self, _deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        let in_flight = *self.control.held.lock().unwrap();
        let unit = "echo".to_owned();
        if self.control.mode() == Mode::Stuck && in_flight > 0 {
            return Err(StopError::Deadline { unit, in_flight });
        }
        let Some((stop, thread)) = self.worker.take() else {
            return Ok(Vec::new());
        };
        stop.write(1).unwrap();
        let queues = thread.join().map_err(|_| StopError::WorkerLost { unit })?;
        *self.control.held.lock().unwrap() = 0;
        Ok(queues)
    }

    fn reset(&mut self) {
        self.scratch = 0;
        self.served.store(0, Ordering::SeqCst);
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.worker.take() {
            stop.write(1).unwrap();
            let _ = thread.join();
        }
    }
}

struct Worker {
    queues: Vec<ActiveQueue>,
    memory: GuestMemory,
    notifier: Arc<dyn Notifier>,
    control: Arc<EchoControl>,
    served: Arc<AtomicU32>,
    stop: EventFd,
    broken: bool,
}

impl Worker {
    fn run(mut self) -> Vec<StoppedQueue> {
        let epoll = Epoll::new().unwrap();
        let add = |fd, data| {
            let event = EpollEvent::new(EventSet::IN, data);
            epoll.ctl(ControlOperation::Add, fd, event).unwrap();
        };
        add(self.stop.as_raw_fd(), u64::MAX);
        for (i, queue) in self.queues.iter().enumerate() {
            add(queue.kick.as_raw_fd(), i as u64);
        }
        let mut queues = std::mem::take(&mut self.queues);
        for queue in &mut queues {
            for head in std::mem::take(&mut queue.parked) {
                self.complete(queue.index, &mut queue.queue, head, 0);
            }
        }
        loop {
            let mut events = [EpollEvent::default(); 4];
            let Ok(count) = epoll.wait(-1, &mut events) else {
                continue;
            };
            for event in &events[..count] {
                if event.data() == u64::MAX {
                    assert!(self.control.mode() != Mode::Dying, "as the test asked");
                    return queues.into_iter().map(stopped).collect();
                }
                let active = &mut queues[usize::try_from(event.data()).unwrap()];
                let mut kick = std::fs::File::from(active.kick.try_clone().unwrap());
                let _ = kick.read(&mut [0; 8]);
                if !self.broken {
                    self.serve(active);
                }
            }
        }
    }

    fn serve(&mut self, active: &mut ActiveQueue) {
        let memory = self.memory.memory();
        loop {
            let chain = match active.queue.iter(&*memory) {
                Ok(mut chains) => chains.next(),
                Err(error) => return self.fail(&error.to_string()),
            };
            let Some(chain) = chain else {
                match active.queue.enable_notification(&*memory) {
                    Ok(true) => continue,
                    Ok(false) => return,
                    Err(error) => return self.fail(&error.to_string()),
                }
            };
            let head = chain.head_index();
            if self.control.mode() != Mode::Serve {
                active.parked.push(head);
                self.control.hold();
                continue;
            }
            let mut bytes = Vec::new();
            let read = chain
                .clone()
                .reader(&memory)
                .map(|reader| reader.take(LONGEST).read_to_end(&mut bytes));
            let written = chain.writer(&memory).map(|mut writer| {
                let room = writer.available_bytes().min(bytes.len());
                writer.write(&bytes[..room]).unwrap_or(0)
            });
            let (Ok(_), Ok(written)) = (read, written) else {
                return self.fail("a bad chain");
            };
            let written = u32::try_from(written).unwrap();
            self.complete(active.index, &mut active.queue, head, written);
        }
    }

    fn complete(&mut self, index: u16, queue: &mut Queue, head: u16, len: u32) {
        let memory = self.memory.memory();
        self.served.fetch_add(1, Ordering::SeqCst);
        if queue.add_used(&*memory, head, len).is_err() {
            return self.fail("a bad head");
        }
        match queue.needs_notification(&*memory) {
            Ok(true) => self.notifier.queue(index),
            Ok(false) => {}
            Err(error) => self.fail(&error.to_string()),
        }
    }

    fn fail(&mut self, reason: &str) {
        self.broken = true;
        self.notifier.needs_reset(reason);
    }
}

fn stopped(active: ActiveQueue) -> StoppedQueue {
    StoppedQueue {
        index: active.index,
        queue: active.queue,
        kick: active.kick,
        parked: active.parked,
    }
}
