//! Real taps, each test in a network namespace of its own. A test that needs
//! what this host has not prints `skipped: WHY` and passes.

use std::os::fd::AsRawFd;
use std::process::Command;

use super::*;
use crate::backend::{Request, Source};
use crate::frame::testing::with_pieces;

/// Moves this thread into a new network namespace, if taps can be had there.
#[expect(unsafe_code, reason = "unshare")]
fn namespace() -> bool {
    // SAFETY: it changes what this thread, which runs one test, sees of the network.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        println!(
            "skipped: no new network namespace: {}",
            io::Error::last_os_error()
        );
        return false;
    }
    if let Err(error) = open_tun() {
        println!("skipped: {error}");
        return false;
    }
    if Command::new("ip").arg("-V").output().is_err() {
        println!("skipped: ip is not installed (Debian: iproute2)");
        return false;
    }
    true
}

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

fn named(name: &str, pairs: u16) -> Request {
    Request {
        source: Source::Interface(name.to_owned()),
        pairs,
        setup: Setup::default(),
    }
}

/// What a device would be given.
fn open(request: &Request) -> Result<Tap, TapError> {
    let Request {
        source,
        pairs,
        setup,
    } = request;
    match source {
        Source::Interface(name) => Tap::named(name, *pairs, setup),
        Source::Descriptors(numbers) => Tap::passed(numbers, *pairs, setup.mtu),
        Source::Stream(path) => panic!("{} is no tap", path.display()),
    }
}

fn exists(name: &str) -> bool {
    Interfaces::open().unwrap().index(name).unwrap().is_some()
}

fn refusal(request: &Request) -> TapError {
    open(request).unwrap_err()
}

#[test]
fn names_are_those_that_the_system_takes() {
    for good in ["a", "tap0", "vmtap%d", "br-lan.7", "123456789012345"] {
        assert!(is_interface_name(good), "{good}");
    }
    for bad in [
        "",
        ".",
        "..",
        "a b",
        "a/b",
        "a:b",
        "a%s",
        "%d%d",
        "1234567890123456",
        "tap\u{e9}",
    ] {
        assert!(!is_interface_name(bad), "{bad}");
        assert!(matches!(refusal(&named(bad, 1)), TapError::Name { .. }));
    }
}

#[test]
fn a_tap_that_is_made_is_set_up_and_goes_with_its_last_descriptor() {
    if !namespace() {
        return;
    }
    let mac: MacAddress = "02:00:00:00:00:17".parse().unwrap();
    let mut request = named("vmtap%d", 1);
    request.setup = Setup {
        owner: Some(424_242),
        mtu: Some(9000),
        mac: Some(mac),
        address: Some((
            "10.1.2.1".parse().unwrap(),
            "255.255.255.0".parse().unwrap(),
        )),
    };
    let first = open(&request).unwrap();
    assert_eq!((first.interface(), first.pairs()), ("vmtap0", 1));
    let second = open(&named("vmtap%d", 1)).unwrap();
    assert_eq!(second.interface(), "vmtap1");
    let shown = Command::new("ip")
        .args(["-d", "addr", "show", "vmtap0"])
        .output()
        .unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    for part in [
        "mtu 9000",
        "02:00:00:00:00:17",
        "10.1.2.1/24",
        "user 424242",
        "vnet_hdr on",
        "UP",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    // It is none that passes frames for one address alone.
    assert_eq!((first.address(), macvtap_address("vmtap0")), (None, None));
    assert!(first.offloads().contains(Offloads::CSUM | Offloads::TSO4));
    let port = first.port(0).unwrap();
    drop(first);
    assert!(exists("vmtap0"));
    drop(port);
    assert!(!exists("vmtap0") && exists("vmtap1"));
}

#[test]
fn a_tap_that_was_there_stays_and_one_in_use_is_busy() {
    if !namespace() {
        return;
    }
    ip("tuntap add dev mine mode tap");
    let tap = open(&named("mine", 1)).unwrap();
    assert!(matches!(refusal(&named("mine", 1)), TapError::Busy { .. }));
    drop(tap);
    assert!(exists("mine"));
    drop(open(&named("mine", 1)).unwrap());
    let mut small = named("mine", 1);
    small.setup.mtu = Some(1400);
    drop(open(&small).unwrap());
    assert_eq!(Interfaces::open().unwrap().mtu("mine").unwrap(), 1400);
}

#[test]
fn queues_are_those_that_the_tap_has() {
    if !namespace() {
        return;
    }
    ip("tuntap add dev one mode tap");
    ip("tuntap add dev many mode tap multi_queue");
    let error = refusal(&named("one", 2));
    assert!(
        matches!(error, TapError::OneQueue { pairs: 2, .. }),
        "{error}"
    );
    let mut tap = open(&named("many", 3)).unwrap();
    assert_eq!(tap.pairs(), 3);
    for pairs in [3, 1, 2, 2, 1] {
        tap.attach(pairs).unwrap();
        tap.set_offloads(Offloads::all()).unwrap();
    }
    drop(tap);
    let one = open(&named("many", 1)).unwrap();
    assert_eq!(one.pairs(), 1);
    // The system would let anybody have more queues of it.
    for pairs in [1, 2] {
        let error = refusal(&named("many", pairs));
        assert!(matches!(error, TapError::Busy { .. }), "{error}");
    }
    drop(one);
    drop(open(&named("many", 2)).unwrap());
    assert_eq!(open(&named("new%d", 2)).unwrap().pairs(), 2);
}

#[test]
fn other_interfaces_are_refused_by_what_they_are() {
    if !namespace() {
        return;
    }
    ip("tuntap add dev tun7 mode tun");
    for (name, found) in [("lo", "another kind"), ("tun7", "a tun interface")] {
        let error = refusal(&named(name, 1)).to_string();
        assert!(error.contains(name) && error.contains(found), "{error}");
    }
}

/// A queue as another program would open it.
fn foreign(name: &str, flags: Flags) -> OwnedFd {
    let tun = open_tun().unwrap();
    ioctl::set_interface(tun.as_fd(), name, flags).unwrap();
    tun
}

fn passed(numbers: &[RawFd], pairs: u16) -> Request {
    Request {
        source: Source::Descriptors(numbers.to_vec()),
        pairs,
        setup: Setup::default(),
    }
}

#[test]
fn descriptors_that_are_no_tap_or_not_as_needed_are_refused() {
    if !namespace() {
        return;
    }
    let null = open_device(Path::new("/dev/null")).unwrap();
    for number in [null.as_raw_fd(), 9999, -1] {
        let error = refusal(&passed(&[number], 1));
        assert!(matches!(error, TapError::Descriptor { number: n, .. } if n == number));
    }
    let bare = foreign("bare", libc::IFF_TAP | libc::IFF_NO_PI);
    let error = refusal(&passed(&[bare.as_raw_fd()], 1));
    assert!(matches!(error, TapError::NoHeader { .. }), "{error}");
    let tun = foreign("tun3", libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    let error = refusal(&passed(&[tun.as_raw_fd()], 1));
    assert!(matches!(error, TapError::WrongKind { .. }), "{error}");
    let (a, b) = (foreign("a", FLAGS), foreign("b", FLAGS));
    let error = refusal(&passed(&[a.as_raw_fd(), b.as_raw_fd()], 2));
    assert!(matches!(error, TapError::Mixed { .. }), "{error}");
    let error = refusal(&passed(&[a.as_raw_fd()], 2));
    assert!(matches!(error, TapError::Count { .. }), "{error}");
    let tap = open(&passed(&[a.as_raw_fd()], 1)).unwrap();
    assert_eq!(tap.interface(), "a");
    drop(tap);
    // It stays open for the next time.
    drop(open(&passed(&[a.as_raw_fd()], 1)).unwrap());
    let mut sized = passed(&[a.as_raw_fd()], 1);
    sized.setup.mtu = Some(1500);
    drop(open(&sized).unwrap());
    sized.setup.mtu = Some(9000);
    let error = refusal(&sized).to_string();
    for part in ["'a' has an MTU of 1500", "ip link set a mtu 9000"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_queue_of_another_namespace_is_not_taken_for_what_has_its_name_here() {
    if !namespace() {
        return;
    }
    let there = [foreign("a", FLAGS), foreign("b", FLAGS)];
    ip("link set dev a mtu 9000");
    // It is kept while the queues are its.
    let _kept = File::open("/proc/thread-self/ns/net").unwrap();
    assert!(namespace());
    let here = foreign("a", FLAGS);
    let sized = |queue: &OwnedFd, mtu| {
        let mut request = passed(&[queue.as_raw_fd()], 1);
        request.setup.mtu = mtu;
        open(&request)
    };
    for mtu in [1500, 9000] {
        assert_eq!(sized(&there[0], Some(mtu)).unwrap().interface(), "a");
    }
    sized(&here, Some(1500)).unwrap();
    assert!(matches!(
        sized(&here, Some(9000)),
        Err(TapError::Mtu { .. })
    ));
    // What passes frames for one address alone is another one's.
    ip("tuntap add dev lower mode tap");
    ip("link add link lower name b type macvlan");
    assert!(macvtap_address("b").is_some());
    assert_eq!(sized(&there[1], None).unwrap().address(), None);
}

#[test]
fn a_queue_that_is_detached_keeps_the_link_and_nobody_out() {
    if !namespace() {
        return;
    }
    ip("tuntap add dev many mode tap multi_queue");
    ip("link set many up");
    let kept = foreign("many", FLAGS | libc::IFF_MULTI_QUEUE);
    assert!(matches!(refusal(&named("many", 1)), TapError::Busy { .. }));
    ioctl::set_attached(kept.as_fd(), false).unwrap();
    assert!(Interfaces::open().unwrap().carrier("many").unwrap());
    let first = open(&named("many", 2)).unwrap();
    assert!(matches!(refusal(&named("many", 1)), TapError::Busy { .. }));
    drop(first);
    drop(open(&named("many", 1)).unwrap());
}

#[test]
fn a_tap_that_is_down_and_open_is_in_use() {
    if !namespace() {
        return;
    }
    ip("tuntap add dev many mode tap multi_queue");
    let tap = open(&named("many", 2)).unwrap();
    // It has no link then.
    ip("link set many down");
    for pairs in [1, 2] {
        let error = refusal(&named("many", pairs));
        assert!(matches!(error, TapError::Busy { .. }), "{error}");
    }
    drop(tap);
    drop(open(&named("many", 2)).unwrap());
}

/// Whether the descriptor has what is asked for just now.
#[expect(unsafe_code, reason = "poll")]
fn ready(fd: std::os::fd::BorrowedFd<'_>, events: i16) -> bool {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one entry, on the stack.
    unsafe { libc::poll(&raw mut entry, 1, 0) == 1 }
}

/// Waits until the port can be read, and reads.
#[expect(unsafe_code, reason = "poll")]
fn receive(port: &mut dyn Port) -> io::Result<Vec<u8>> {
    loop {
        let mut parts = [vec![0; HEADER_LEN], vec![0; 14], vec![0; 9000]];
        match with_pieces(&mut parts, |pieces| port.receive(pieces)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut entry = libc::pollfd {
                    fd: port.fd().as_raw_fd(),
                    events: libc::POLLIN,
                    revents: 0,
                };
                // SAFETY: one entry, on the stack.
                let ready = unsafe { libc::poll(&raw mut entry, 1, 20_000) };
                assert_eq!(ready, 1, "nothing comes");
            }
            result => return result.map(|len| parts.concat()[..len].to_vec()),
        }
    }
}

#[test]
fn frames_go_both_ways_and_a_tap_that_is_deleted_is_told() {
    if !namespace() {
        return;
    }
    let mut request = named("vmtap%d", 1);
    request.setup.address = Some((
        "10.9.0.1".parse().unwrap(),
        "255.255.255.0".parse().unwrap(),
    ));
    let tap = open(&request).unwrap();
    let mut port = tap.port(0).unwrap();
    let (us, all) = ([2, 0, 0, 0, 0, 9], [0xff; 6]);
    // Who has 10.9.0.1? Tell 10.9.0.2.
    let arp = [
        &all[..],
        &us,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &us,
        &[10, 9, 0, 2],
        &[0; 6],
        &[10, 9, 0, 1],
    ]
    .concat();
    let mut parts = [
        vec![0; HEADER_LEN - 2],
        vec![0; 2],
        arp[..20].to_vec(),
        arp[20..].to_vec(),
    ];
    with_pieces(&mut parts, |pieces| port.send(pieces)).unwrap();
    // The host says other things too.
    loop {
        let frame = receive(&mut *port).unwrap();
        let frame = &frame[HEADER_LEN..];
        if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
            assert_eq!((&frame[..6], &frame[28..32]), (&us[..], &[10, 9, 0, 1][..]));
            break;
        }
    }
    let mut short = [vec![0; HEADER_LEN + 4]];
    assert!(with_pieces(&mut short, |pieces| port.send(pieces)).is_err());
    ip("link set vmtap0 down");
    let error = with_pieces(&mut parts, |pieces| port.send(pieces)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    let watch = tap.watch().unwrap().unwrap();
    watch.take();
    tap.check().unwrap();
    ip("link del vmtap0");
    assert!(ready(watch.fd(), libc::POLLIN));
    watch.take();
    assert!(!ready(watch.fd(), libc::POLLIN));
    assert_eq!(tap.check().unwrap_err().raw_os_error(), Some(libc::EBADFD));
    loop {
        // What had come before may still be there.
        if let Err(error) = receive(&mut *port) {
            assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
            break;
        }
    }
    let error = with_pieces(&mut parts, |pieces| port.send(pieces)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
}
