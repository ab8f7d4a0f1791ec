//! `vireo send-key`.

use api::wire::VmSendKey;
use clap::Args;

use super::super::Misuse;
use super::super::target::SocketFlag;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo send-key web ctrl-alt-delete
  vireo send-key web ctrl-alt-f2 ret
      One after the other. Keys have QEMU's names: a, 1, ret, spc, esc, f1, shift, ctrl, alt, meta_l, kp_enter, …
  vireo send-key web --text 'root
  '
      Types root and Enter.";

#[derive(Debug, Args)]
pub(in crate::cli) struct SendKeyArgs {
    /// Name of the machine, and keys; those that are held together are joined by -
    #[arg(value_names = ["NAME", "KEYS"], num_args = 0..)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// Type this, as on a keyboard of the United States
    #[arg(long, value_name = "TEXT")]
    text: Option<String>,
    /// Id of the keyboard, where there are several
    #[arg(long, value_name = "ID")]
    id: Option<String>,
}

pub(super) fn send(arguments: SendKeyArgs) -> anyhow::Result<()> {
    let SendKeyArgs {
        words,
        socket,
        text,
        id,
    } = arguments;
    let (mut remote, keys) = socket.connect_and_take(words)?;
    if keys.is_empty() == text.is_none() {
        return Err(Misuse("give either KEYS or --text TEXT".to_owned()).into());
    }
    let sent = remote.client.send_key(&VmSendKey { keys, text, id });
    sent.map_err(|error| remote.failed(error))
}
