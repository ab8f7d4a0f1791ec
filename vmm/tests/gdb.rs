//! A debugger at `--gdb`, played by the test: it holds the guest before its
//! first instruction, and one that vanishes leaves a machine that works.
//!
//! Guests are a few instructions, which any `/dev/kvm` runs; without one the
//! tests say so and pass.

#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Where the guest is, and its first instruction.
const ENTRY: u32 = 0x10_0000;
/// Nothing here takes long; this ends a test that would hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a guest that should wait has the chance not to.
const CHANCE: Duration = Duration::from_millis(200);

/// Writes 0x34 (S5, go) to the sleep control register at port 0x600, and halts.
const POWER_OFF: &[u8] = &[0x66, 0xBA, 0x00, 0x06, 0xB0, 0x34, 0xEE, 0xF4, 0xEB, 0xFD];
/// Jumps to itself.
const SPIN: &[u8] = &[0xEB, 0xFE];

/// An ELF file with one segment of `code` and a note that names it as PVH's entry.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());

    let mut image = Vec::new();
    image.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for field in [u64::from(ENTRY), 64, 0] {
        image.extend(field.to_le_bytes());
    }
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    for (kind, at, address, bytes) in [(1u32, 0x100u64, ENTRY, code), (4, 0x200, 0, &note)] {
        image.extend(kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        let len = u64::try_from(bytes.len()).unwrap();
        for field in [at, address.into(), address.into(), len, len, 1] {
            image.extend(field.to_le_bytes());
        }
    }
    image.resize(0x100, 0);
    image.extend(code);
    image.resize(0x200, 0);
    image.extend(&note);
    image
}

/// A machine that waits for its debugger.
struct Machine {
    child: Child,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Machine {
    /// `None` where there is no KVM.
    fn start(code: &[u8]) -> Option<Self> {
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            eprintln!("skipped: /dev/kvm: {error}");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("kernel");
        fs::write(&kernel, elf(code)).unwrap();
        let socket = directory.path().join("gdb");
        let mut child = Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args([
                "run",
                "--memory=4M",
                "--serial=null",
                "--shutdown-timeout=0",
            ])
            .arg("--kernel")
            .arg(kernel)
            .arg(format!("--gdb=unix:{}", socket.display()))
            .env_remove("VIREO_LOG")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stderr = child.stderr.as_mut().unwrap();
        BufReader::new(stderr).read_line(&mut line).unwrap();
        assert!(line.contains("waits for gdb at unix:/"), "{line}");
        Some(Self {
            child,
            socket,
            _directory: directory,
        })
    }

    fn debugger(&self) -> Debugger {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Debugger(stream)
    }

    /// Ends it at once.
    fn signal(&self) {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: the child has not been waited for, so the number is its own.
        #[expect(unsafe_code, reason = "kill is a system call")]
        let result = unsafe { libc::kill(pid, libc::SIGTERM) };
        assert_eq!(result, 0);
    }

    fn end(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The debugger's side of the remote protocol.
struct Debugger(UnixStream);

impl Debugger {
    fn send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        write!(self.0, "${packet}#{sum:02x}").unwrap();
    }

    /// Sends a packet and gives the answer to it, runs of a letter spelled out.
    fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        let mut answer = Vec::new();
        loop {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap();
            match byte {
                [b'$'] => answer.clear(),
                [b'#'] => break,
                [b'*'] => {
                    self.0.read_exact(&mut byte).unwrap();
                    let repeated = *answer.last().unwrap();
                    let len = answer.len() + usize::from(byte[0]) - 29;
                    answer.resize(len, repeated);
                }
                [byte] => answer.push(byte),
            }
        }
        let mut sum = [0; 2];
        self.0.read_exact(&mut sum).unwrap();
        self.0.write_all(b"+").unwrap();
        String::from_utf8(answer).unwrap()
    }

    /// Lets the guest run, and returns once the packet has arrived.
    fn let_go(&mut self) {
        self.send("vCont;c");
        let mut acknowledgement = [0];
        self.0.read_exact(&mut acknowledgement).unwrap();
        assert_eq!(&acknowledgement, b"+");
    }

    /// Where the vCPU is: the register after the sixteen general ones.
    fn instruction_pointer(&mut self) -> u64 {
        let registers = self.ask("g");
        let bytes: Vec<u8> = (256..272)
            .step_by(2)
            .map(|at| u8::from_str_radix(&registers[at..at + 2], 16).unwrap())
            .collect();
        u64::from_le_bytes(bytes.try_into().unwrap())
    }
}

#[test]
fn a_guest_waits_at_its_first_instruction_and_runs_on_when_the_debugger_is_gone() {
    let Some(machine) = Machine::start(POWER_OFF) else {
        return;
    };
    // A guest that does not wait is through in a millisecond.
    std::thread::sleep(CHANCE);
    let mut debugger = machine.debugger();
    assert!(debugger.ask("?").starts_with('T'));
    assert_eq!(debugger.instruction_pointer(), ENTRY.into());
    drop(debugger);
    assert_eq!(machine.end().code(), Some(0));
}

#[test]
fn a_debugger_that_vanishes_while_the_guest_runs_leaves_a_machine_that_answers() {
    let Some(machine) = Machine::start(SPIN) else {
        return;
    };
    let mut first = machine.debugger();
    assert!(first.ask("?").starts_with('T'));
    first.let_go();
    drop(first);
    // Served only when the first has been seen off.
    let mut second = machine.debugger();
    assert!(second.ask("?").starts_with('T'));
    assert_eq!(second.instruction_pointer(), ENTRY.into());
    machine.signal();
    assert_eq!(machine.end().code(), Some(0));
}
