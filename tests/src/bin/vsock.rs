//! Stream sockets in a Linux guest: busybox has no program for them.
//!
//!     vsock echo PORT           sends back what comes, connection after connection
//!     vsock connect CID PORT    standard input there, and what comes to standard output

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Result, bail};

/// From any address.
const ANY: u32 = u32::MAX;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["echo", port] => echo(port),
        ["connect", cid, port] => connect(cid, port),
        _ => {
            eprintln!("usage: vsock echo PORT | vsock connect CID PORT");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vsock: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn echo(port: &str) -> Result<()> {
    let listener = socket()?;
    let address = address(ANY, port.parse()?)?;
    call(&listener, &address, libc::bind).context("bind")?;
    listen(&listener).context("listen")?;
    loop {
        let stream = accept(&listener).context("accept")?;
        // Whoever goes before all has been sent is of no concern to the next one.
        let _ = copy(&mut &stream, &mut &stream);
    }
}

fn connect(cid: &str, port: &str) -> Result<()> {
    let socket = socket()?;
    let address = address(cid.parse()?, port.parse()?)?;
    call(&socket, &address, libc::connect).context("connect")?;
    let stream = UnixStream::from(socket);
    let sending = stream.try_clone()?;
    let sender = thread::spawn(move || {
        copy(&mut io::stdin().lock(), &mut &sending)?;
        sending.shutdown(Shutdown::Write)
    });
    copy(&mut &stream, &mut io::stdout().lock()).context("receive")?;
    match sender.join() {
        Ok(sent) => sent.context("send"),
        Err(_) => bail!("the sender has panicked"),
    }
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return to.flush();
        }
        to.write_all(buffer.get(..count).unwrap_or_default())?;
    }
}

fn address(cid: u32, port: u32) -> Result<libc::sockaddr_vm> {
    Ok(libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK.try_into()?,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: cid,
        svm_zero: [0; 4],
    })
}

type Call =
    unsafe extern "C" fn(libc::c_int, *const libc::sockaddr, libc::socklen_t) -> libc::c_int;

#[expect(unsafe_code, reason = "the standard library has no such sockets")]
fn call(socket: &OwnedFd, address: &libc::sockaddr_vm, call: Call) -> Result<()> {
    let len = size_of_val(address).try_into()?;
    let address: *const libc::sockaddr_vm = address;
    // SAFETY: bind and connect read `len` bytes at the address, which are all of it.
    let rc = unsafe { call(socket.as_raw_fd(), address.cast(), len) };
    if rc < 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(())
}

#[expect(unsafe_code, reason = "the standard library has no such sockets")]
fn socket() -> Result<OwnedFd> {
    // SAFETY: plain numbers.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    owned(fd).context("socket")
}

#[expect(unsafe_code, reason = "the standard library has no such sockets")]
fn listen(socket: &OwnedFd) -> Result<()> {
    // SAFETY: plain numbers.
    let rc = unsafe { libc::listen(socket.as_raw_fd(), 8) };
    if rc < 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(())
}

#[expect(unsafe_code, reason = "the standard library has no such sockets")]
fn accept(socket: &OwnedFd) -> Result<UnixStream> {
    let nobody = std::ptr::null_mut();
    // SAFETY: without a place for it, the address is not written.
    let fd = unsafe { libc::accept(socket.as_raw_fd(), nobody, std::ptr::null_mut()) };
    owned(fd).map(UnixStream::from)
}

#[expect(unsafe_code, reason = "a new descriptor has no owner yet")]
fn owned(fd: libc::c_int) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: it has just been made, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
