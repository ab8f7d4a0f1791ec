//! Keyboards and pointers, and what is typed and pointed at. Additions to v1.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A keyboard, tablet or mouse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InputConfig {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: InputType,
    /// The serial number that the guest sees, at most 64 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Its name, unique in the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The PCI slot, 1 to 31.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

/// What an input device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InputType {
    /// Keys and lights.
    Keyboard,
    /// A pointer that tells where it is.
    Tablet,
    /// A pointer that tells how far it has moved.
    Mouse,
}

/// `vm.send-key`: either keys or a text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSendKey {
    /// Keys by QEMU's names, one after the other; those that are held together are joined by `-`, as in `ctrl-alt-delete`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// What is typed, at most 1024 characters of a keyboard of the United States.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The keyboard's id; the first one without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// `vm.input`: what happens at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmInput {
    /// At most 15 of each device.
    pub events: Vec<InputEvent>,
    /// The device's id; without, each event goes to the first device that has it, a tablet before a mouse.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// Something that happens to a keyboard or pointer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum InputEvent {
    /// A key goes down or up.
    Key {
        /// QEMU's name of it.
        key: String,
        /// Whether it goes down.
        down: bool,
    },
    /// A button goes down or up.
    Button {
        /// Which.
        button: PointerButton,
        /// Whether it goes down.
        down: bool,
    },
    /// The pointer of a tablet is somewhere.
    Place {
        /// Along which axis: `x` or `y`.
        axis: PointerAxis,
        /// Where, from 0 to 32767.
        at: u32,
    },
    /// The pointer of a mouse moves, or a wheel of either turns.
    Move {
        /// Along which axis.
        axis: PointerAxis,
        /// By how much, from -32767 to 32767.
        by: i32,
    },
}

/// A button of a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PointerButton {
    /// For the index finger.
    Left,
    /// The other one.
    Right,
    /// The wheel's.
    Middle,
    /// Back.
    Side,
    /// Forward.
    Extra,
}

/// An axis of a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PointerAxis {
    /// To the right.
    X,
    /// Downwards.
    Y,
    /// The wheel, away from the user.
    Wheel,
    /// The other wheel, to the right.
    Hwheel,
}
