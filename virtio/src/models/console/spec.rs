//! Numbers and layouts of Virtio 1.2, section 5.3.

/// Configuration space has the size of the console (5.3.3).
pub const F_SIZE: u64 = 1 << 0;
/// There are several ports and control queues.
pub const F_MULTIPORT: u64 = 1 << 1;
/// A byte can be written to the console through configuration space.
pub const F_EMERG_WRITE: u64 = 1 << 2;

/// Where the emergency byte is written (5.3.4).
pub const EMERG_WR: u64 = 8;

/// The queue on which the device tells of ports, and that on which the driver does (5.3.2).
pub const CONTROL_TO_DRIVER: usize = 2;
/// See [`CONTROL_TO_DRIVER`].
pub const CONTROL_TO_DEVICE: usize = 3;

/// The queue with buffers for what port `port` receives; the next one is for what it sends.
#[must_use]
pub const fn receive_queue(port: usize) -> usize {
    if port == 0 { 0 } else { 2 + 2 * port }
}

/// Events of control messages (5.3.6.2).
pub const DEVICE_READY: u16 = 0;
/// The device has a port.
pub const PORT_ADD: u16 = 1;
/// The device has a port no more.
pub const PORT_REMOVE: u16 = 2;
/// The driver has taken a port into use.
pub const PORT_READY: u16 = 3;
/// The port is a console.
pub const CONSOLE_PORT: u16 = 4;
/// The size of the console.
pub const RESIZE: u16 = 5;
/// Somebody has opened or closed the port.
pub const PORT_OPEN: u16 = 6;
/// The port's name.
pub const PORT_NAME: u16 = 7;

/// The length of a control message without what follows it, in bytes.
pub const CONTROL_LEN: usize = 8;

/// The common part of a control message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    /// The port's number.
    pub port: u32,
    /// What it is about.
    pub event: u16,
    /// 0 or 1.
    pub value: u16,
}

impl Control {
    /// Reads a message.
    #[must_use]
    pub fn read(bytes: [u8; CONTROL_LEN]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        }
    }

    /// The message, followed by `more`.
    #[must_use]
    pub fn with(self, more: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(CONTROL_LEN + more.len());
        bytes.extend(self.port.to_le_bytes());
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes.extend(more);
        bytes
    }
}
