use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Receiver;

use migration::{DynSnapshot, Snapshot};
use serde_json::json;

use super::hub::MAX_REFUSALS;
use super::spec::{
    EVENT, HEADER_LEN, HOST_CID, Header, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW, RECEIVE, TRANSMIT,
    TYPE_STREAM,
};
use super::testing::{CID, Host};
use super::*;
use crate::device::ActiveQueue;
use crate::memory::GuestMemory;
use crate::testing::{DATA, Driver, Notice, PATIENCE, memory, soon, start};

fn device(host: &Host) -> Vsock {
    let config = VsockConfig {
        cid: CID,
        socket: host.path(),
    };
    let opener = Arc::new(host.clone()) as _;
    Vsock::new("vsock0", &config, &opener, Arc::new(Instant::now)).unwrap()
}

/// A device that is in use, and its driver.
struct Bench {
    host: Host,
    device: Vsock,
    memory: GuestMemory,
    queues: Vec<Driver>,
    notices: Receiver<Notice>,
}

impl Bench {
    fn new() -> Self {
        let host = Host::new();
        let mut device = device(&host);
        let memory = memory();
        let queues: Vec<_> = (0..3).map(|n| Driver::new(&memory, n, 8)).collect();
        let active = queues.iter().map(Driver::activate).collect();
        let notices = start(&mut device, 0, &memory, active);
        Self {
            host,
            device,
            memory,
            queues,
            notices,
        }
    }

    fn returned(&mut self, queue: usize) -> (u32, u32) {
        loop {
            if let Some(returned) = self.queues[queue].returned() {
                return returned;
            }
            let notice = self.notices.recv_timeout(PATIENCE).unwrap();
            assert!(!matches!(notice, Notice::Reset(_)), "{notice:?}");
        }
    }

    fn packet(op: u16, host: u32, guest: u32, body: &[u8]) -> Vec<u8> {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            len: u32::try_from(body.len()).unwrap(),
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: 1 << 18,
            fwd_cnt: 0,
        };
        let mut packet = Vec::new();
        header.write(&mut packet);
        packet.extend(body);
        packet
    }

    /// Puts a packet into the queue, in two pieces.
    fn offer(&mut self, packet: &[u8]) {
        let at = DATA + 0x1_0000;
        let len = u32::try_from(packet.len()).unwrap();
        let driver = &mut self.queues[TRANSMIT];
        driver.put_bytes(at, packet);
        let cut = len.min(20);
        driver.offer(&[(at, cut, false), (at + u64::from(cut), len - cut, false)]);
        driver.kick();
    }

    fn say(&mut self, op: u16, host: u32, guest: u32, body: &[u8]) {
        self.offer(&Self::packet(op, host, guest, body));
        assert_eq!(self.returned(TRANSMIT).1, 0);
    }

    fn buffer(&mut self, queue: usize, len: u32) {
        self.queues[queue].offer(&[(DATA, len, true)]);
        self.queues[queue].kick();
    }

    fn hear(&mut self) -> (u16, u32, u32, Vec<u8>) {
        self.buffer(RECEIVE, 4096);
        let (_, len) = self.returned(RECEIVE);
        let bytes = self.queues[RECEIVE].bytes(DATA, usize::try_from(len).unwrap());
        let (header, body) = bytes.split_first_chunk().unwrap();
        let header = Header::read(header);
        (header.op, header.src_port, header.dst_port, body.to_vec())
    }

    fn meet_client(&mut self) -> (UnixStream, u32) {
        let client = self.host.client("CONNECT 52\n");
        let (op, host, guest, _) = self.hear();
        assert_eq!((op, guest), (OP_REQUEST, 52));
        self.say(OP_RESPONSE, host, guest, &[]);
        let mut line = [0; 14];
        (&client).read_exact(&mut line).unwrap();
        assert_eq!(&line[..3], b"OK ");
        (client, host)
    }

    fn restart(&mut self, queues: Vec<ActiveQueue>) {
        self.notices = start(&mut self.device, 0, &self.memory, queues);
    }

    fn counted(&self, name: &str) -> u64 {
        let all = self.device.counters().unwrap().read();
        all.into_iter().find(|(known, _)| *known == name).unwrap().1
    }
}

#[test]
fn packets_go_through_the_queues_both_ways() {
    let mut bench = Bench::new();
    let mut config = [0xff; 12];
    bench.device.read_config(0, &mut config);
    assert_eq!(config, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let (mut client, host) = bench.meet_client();
    client.write_all(b"question").unwrap();
    assert_eq!(bench.hear(), (OP_RW, host, 52, b"question".to_vec()));
    bench.say(OP_RW, host, 52, b"answer");
    let mut answer = [0; 6];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    let server = bench.host.server(9);
    bench.say(OP_REQUEST, 9, 1, &[]);
    assert_eq!(bench.hear(), (OP_RESPONSE, 9, 1, vec![]));
    server.accept().unwrap();
    assert_eq!(bench.counted("connections"), 2);
}

#[test]
fn what_is_no_packet_is_counted_and_comes_back() {
    let mut bench = Bench::new();
    let whole = Bench::packet(OP_RW, 1, 1, b"12345678");
    for len in [1, 20, 21, 43] {
        bench.offer(&whole[..len]);
        assert_eq!(bench.returned(TRANSMIT).1, 0);
    }
    assert_eq!(bench.counted("errors"), 4);
    let (client, host) = bench.meet_client();
    // Its bytes are not all there.
    bench.offer(&Bench::packet(OP_RW, host, 52, b"12345678")[..HEADER_LEN + 7]);
    bench.returned(TRANSMIT);
    assert_eq!(bench.hear(), (OP_RST, host, 52, vec![]));
    assert_eq!((&client).read(&mut [0]).unwrap(), 0);
    assert_eq!(bench.counted("errors"), 5);
}

#[test]
fn buffers_without_room_come_back_empty_and_nothing_is_lost() {
    let mut bench = Bench::new();
    let (mut client, host) = bench.meet_client();
    client.write_all(b"question").unwrap();
    for len in [1, 43, 44, 44] {
        bench.buffer(RECEIVE, len);
        assert_eq!(bench.returned(RECEIVE).1, 0, "{len}");
    }
    assert_eq!(bench.hear(), (OP_RW, host, 52, b"question".to_vec()));
    // A buffer that is not memory ends the connection that it was for.
    client.write_all(b"more").unwrap();
    let end = crate::testing::END;
    bench.queues[RECEIVE].offer(&[(end - 45, 64, true)]);
    bench.queues[RECEIVE].kick();
    bench.returned(RECEIVE);
    assert_eq!(bench.hear(), (OP_RST, host, 52, vec![]));
}

#[test]
fn a_driver_that_takes_no_refusals_has_its_packets_wait() {
    let mut bench = Bench::new();
    for _ in 0..MAX_REFUSALS {
        bench.say(OP_RW, 1, 1, &[]);
    }
    let packet = Bench::packet(OP_RW, 1, 1, &[]);
    for _ in 0..4 {
        bench.offer(&packet);
    }
    let most = u16::try_from(MAX_REFUSALS).unwrap();
    for taken in 0..4 {
        assert_eq!(bench.queues[TRANSMIT].used_index(), most + taken);
        assert_eq!(bench.hear().0, OP_RST);
        bench.returned(TRANSMIT);
    }
}

#[test]
fn connections_go_on_after_a_stop_and_a_start() {
    let mut bench = Bench::new();
    let (mut client, host) = bench.meet_client();
    let stopped = bench.device.stop(soon()).unwrap();
    assert_eq!(stopped.len(), 3);
    client.write_all(b"meanwhile").unwrap();
    bench.restart(stopped.into_iter().map(ActiveQueue::from).collect());
    assert_eq!(bench.hear(), (OP_RW, host, 52, b"meanwhile".to_vec()));
}

#[test]
fn a_reset_ends_all_connections_and_clients_can_come_again() {
    let mut bench = Bench::new();
    let (mut client, _) = bench.meet_client();
    bench.device.stop(soon()).unwrap();
    bench.device.reset();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert_eq!(bench.counted("connections"), 0);
    // The rings begin anew.
    bench.memory = memory();
    bench.queues = (0..3).map(|n| Driver::new(&bench.memory, n, 8)).collect();
    let active = bench.queues.iter().map(Driver::activate).collect();
    bench.restart(active);
    bench.meet_client();
}

#[test]
fn a_restored_device_tells_its_driver_once_that_there_are_no_connections() {
    let mut bench = Bench::new();
    bench.meet_client();
    let stopped = bench.device.stop(soon()).unwrap();
    let saved = bench.device.save().unwrap();
    assert_eq!(saved, VsockV1 { guest_cid: CID });
    let section = bench.device.save_section("vsock0").unwrap();
    let host = Host::new();
    let mut other = device(&host);
    other.restore_section(&section).unwrap();
    assert_eq!(other.save().unwrap(), saved);
    (bench.host, bench.device) = (host, other);
    bench.restart(stopped.into_iter().map(ActiveQueue::from).collect());
    for _ in 0..2 {
        bench.buffer(EVENT, 8);
    }
    assert_eq!(bench.returned(EVENT).1, 4);
    assert_eq!(bench.queues[EVENT].bytes(DATA, 4), [0; 4]);
    // It works, and has not told it again.
    bench.meet_client();
    assert_eq!(bench.queues[EVENT].used_index(), 1);
    let strange = VsockV1 { guest_cid: 2 };
    let refused = bench.device.restore(strange);
    assert!(matches!(refused, Err(RestoreError::Invalid { .. })));
}

#[test]
fn an_address_that_no_guest_has_and_a_socket_that_is_in_use_are_refused() {
    let host = Host::new();
    let opener: Arc<dyn block::Opener> = Arc::new(host.clone());
    let refusal = |cid, socket: &PathBuf| {
        let socket = socket.clone();
        let config = VsockConfig { cid, socket };
        let made = Vsock::new("x", &config, &opener, Arc::new(Instant::now));
        made.err().unwrap().to_string()
    };
    for cid in [0, 1, 2, 0xffff_ffff, 1 << 32] {
        assert!(
            refusal(cid, &host.path()).contains("no guest's address"),
            "{cid}"
        );
    }
    let _listening = opener.listen(&host.path()).unwrap();
    assert!(refusal(3, &host.path()).contains("in use"));
}

#[test]
fn the_table_of_fields_and_the_struct_agree() {
    let config: VsockConfig = serde_json::from_value(json!({"cid": 3, "socket": "/s"})).unwrap();
    let Value::Object(object) = serde_json::to_value(config).unwrap() else {
        panic!("a struct is an object");
    };
    let names: Vec<_> = MODEL.fields.iter().map(|f| f.name).collect();
    assert_eq!(object.keys().map(String::as_str).collect::<Vec<_>>(), names);
    assert!(serde_json::from_value::<VsockConfig>(json!({"cid": 3})).is_err());
}
