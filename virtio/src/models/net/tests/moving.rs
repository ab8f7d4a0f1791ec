//! Frames go through, whatever their shape and whatever happens meanwhile.

use virtio_queue::QueueT;

use super::*;

#[test]
fn a_frame_comes_into_the_first_buffer_and_says_so() {
    let mut rig = Rig::new();
    rig.post(DATA, 2000);
    let sent = frame(MAC, 100);
    rig.peer.send(&sent).unwrap();
    assert_eq!(returned(&mut rig.rx, &rig.notices), (0, 112));
    assert_eq!(rig.rx.get::<u16>(DATA + 10), 1);
    assert_eq!(rig.rx.bytes(DATA + 12, 100), sent[12..]);
    let counters = rig.counters();
    assert_eq!((counters["rx_bytes"], counters["rx_frames"]), (100, 1));
}

#[test]
fn a_frame_is_cut_over_buffers_that_come_back_together() {
    let mut rig = Rig::new();
    for buffer in 0..6 {
        rig.rx.offer(&[(DATA + buffer * 0x1000, 100, true)]);
    }
    let sent = frame(MAC, 250);
    rig.peer.send(&sent).unwrap();
    rig.peer.send(&frame(MAC, 60)).unwrap();
    rig.rx.kick();
    let lens: Vec<_> = (0..4)
        .map(|_| returned(&mut rig.rx, &rig.notices))
        .collect();
    assert_eq!(lens, [(0, 100), (1, 100), (2, 62), (3, 72)]);
    let parts = [(0, 100), (1, 100), (2, 62)];
    let got = parts
        .map(|(buffer, len)| rig.rx.bytes(DATA + buffer * 0x1000, len))
        .concat();
    assert_eq!(got[10..12], [3, 0]);
    assert_eq!(got[12..], sent[12..]);
    assert_eq!(rig.rx.get::<u16>(DATA + 0x3000 + 10), 1);
}

#[test]
fn a_frame_that_is_longer_than_all_buffers_waits_for_more_of_them() {
    let mut rig = Rig::new();
    rig.post(DATA, 100);
    let sent = frame(MAC, 300);
    rig.peer.send(&sent).unwrap();
    rig.rx.kick_and_wait();
    rig.post(DATA + 0x1000, 150);
    rig.rx.kick_and_wait();
    assert_eq!(rig.rx.returned(), None);
    rig.post(DATA + 0x2000, 500);
    let lens: Vec<_> = (0..3)
        .map(|_| returned(&mut rig.rx, &rig.notices))
        .collect();
    assert_eq!(lens, [(0, 100), (1, 150), (2, 62)]);
    let parts = [(0, 100), (1, 150), (2, 62)];
    let got = parts
        .map(|(buffer, len)| rig.rx.bytes(DATA + buffer * 0x1000, len))
        .concat();
    assert_eq!(got[12..], sent[12..]);
}

#[test]
fn a_frame_that_can_never_fit_is_dropped_and_the_next_one_comes() {
    let mut rig = Rig::with(ALL & !bit(VIRTIO_NET_F_MRG_RXBUF), 1, None);
    rig.peer.send(&frame(MAC, 300)).unwrap();
    rig.peer.send(&[1; 20]).unwrap();
    rig.peer.send(&frame(MAC, 64)).unwrap();
    rig.post(DATA, 100);
    assert_eq!(returned(&mut rig.rx, &rig.notices), (0, 76));
    assert_eq!(rig.rx.get::<u16>(DATA + 10), 1);
    let counters = rig.counters();
    assert_eq!((counters["rx_dropped"], counters["rx_errors"]), (1, 1));
}

#[test]
fn a_frame_of_the_greatest_length_fills_many_buffers() {
    let mut rig = Rig::new();
    for buffer in 0..15_u64 {
        rig.rx.offer(&[(DATA + buffer * 0x2000, 0x1400, true)]);
    }
    let sent = frame(MAC, 65_535 + 14);
    rig.peer.send(&sent).unwrap();
    rig.rx.kick();
    let lens: Vec<_> = (0..13)
        .map(|_| returned(&mut rig.rx, &rig.notices).1)
        .collect();
    assert_eq!(lens.iter().sum::<u32>(), 65_561);
    let got: Vec<u8> = (0..13_u64)
        .flat_map(|buffer| rig.rx.bytes(DATA + buffer * 0x2000, 0x1400))
        .collect();
    assert_eq!(got[10..12], [13, 0]);
    assert!(got[12..sent.len()] == sent[12..]);
}

#[test]
fn a_long_frame_after_many_short_ones_comes_whole() {
    let mut rig = Rig::new();
    for number in 0..100 {
        rig.post(DATA, 0x1000);
        rig.peer.send(&frame(MAC, 60)).unwrap();
        let head = u32::from(number % SIZE);
        assert_eq!(returned(&mut rig.rx, &rig.notices), (head, 72));
    }
    for buffer in 0..12_u64 {
        rig.rx.offer(&[(DATA + buffer * 0x1000, 0x1000, true)]);
    }
    let sent = frame(MAC, 40_000);
    rig.peer.send(&sent).unwrap();
    rig.rx.kick();
    let lens: Vec<_> = (0..10)
        .map(|_| returned(&mut rig.rx, &rig.notices).1)
        .collect();
    assert_eq!(lens.iter().sum::<u32>(), 40_012);
    let got = rig.rx.bytes(DATA, sent.len());
    assert_eq!(got[10..12], [10, 0]);
    assert!(got[12..] == sent[12..]);
    // The next one is expected to be as long, and the one after is not held up by that.
    let sent = frame(MAC, 5000);
    rig.peer.send(&sent).unwrap();
    assert_eq!(returned(&mut rig.rx, &rig.notices).1, 4096);
    assert_eq!(returned(&mut rig.rx, &rig.notices).1, 916);
    assert!(rig.rx.bytes(DATA + 0xa000, sent.len())[12..] == sent[12..]);
}

#[test]
fn a_frame_goes_out_wherever_its_chain_is_cut() {
    let mut rig = Rig::new();
    let sent = frame(OTHER, 200);
    rig.tx.put_bytes(DATA, &sent);
    for cut in [1, 5, 11, 12, 13, 100] {
        rig.transmit(&[
            (DATA, cut, false),
            (DATA + u64::from(cut), 212 - cut, false),
        ]);
        assert_eq!(rig.arrived(), sent);
        assert_eq!(returned(&mut rig.tx, &rig.notices).1, 0);
    }
    let counters = rig.counters();
    assert_eq!((counters["tx_bytes"], counters["tx_frames"]), (1200, 6));
}

#[test]
fn chains_that_are_no_frames_are_given_back_and_the_next_one_goes_out() {
    let mut rig = Rig::new();
    let sent = frame(OTHER, 60);
    rig.tx.put_bytes(DATA, &sent);
    let bad: [&[Piece]; 6] = [
        &[(DATA, 25, false)],
        &[(DATA, 0, false)],
        &[(DATA, 70_000, false)],
        &[(DATA, 72, true)],
        &[(DATA, 72, false), (DATA, 8, true)],
        &[(DATA, 30, false), (crate::testing::END, 42, false)],
    ];
    for chain in bad {
        rig.tx.offer(chain);
    }
    rig.transmit(&[(DATA, 72, false)]);
    assert_eq!(rig.arrived(), sent);
    for _ in 0..7 {
        assert_eq!(returned(&mut rig.tx, &rig.notices).1, 0);
    }
    assert_eq!(
        (rig.counters()["tx_errors"], rig.counters()["tx_frames"]),
        (6, 1)
    );
}

#[test]
fn buffers_that_are_no_buffers_are_given_back_and_the_next_one_is_filled() {
    let mut rig = Rig::new();
    rig.rx.offer(&[(DATA, 64, false)]);
    rig.rx.offer(&[(DATA, 11, true)]);
    rig.rx.offer(&[(crate::testing::END, 64, true)]);
    rig.post(DATA, 512);
    rig.peer.send(&frame(MAC, 60)).unwrap();
    let lens: Vec<_> = (0..4)
        .map(|_| returned(&mut rig.rx, &rig.notices).1)
        .collect();
    assert_eq!(lens, [0, 0, 0, 72]);
    assert_eq!(rig.counters()["rx_errors"], 3);
}

#[test]
fn frames_wait_for_a_network_that_is_full_and_keep_their_order() {
    let mut rig = Rig::new();
    let mut sent = 0_u8;
    let mut seen = 0_u8;
    // More than any socket holds.
    for _ in 0..40 {
        for _ in 0..SIZE {
            let mut next = frame(OTHER, 4000);
            next[40] = sent;
            let at = DATA + u64::from(sent % 16) * 0x1000;
            rig.tx.put_bytes(at, &next);
            rig.tx.offer(&[(at, 4012, false)]);
            sent = sent.wrapping_add(1);
        }
        rig.tx.kick();
        for _ in 0..SIZE {
            assert_eq!(rig.arrived()[40], seen);
            seen = seen.wrapping_add(1);
        }
        for _ in 0..SIZE {
            returned(&mut rig.tx, &rig.notices);
        }
    }
    assert_eq!(rig.counters()["tx_frames"], 640);
}

#[test]
fn a_network_that_vanishes_takes_the_link_down_and_the_guest_goes_on() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(), 1);
    let (other, _) = UnixDatagram::pair().unwrap();
    drop(std::mem::replace(&mut rig.peer, other));
    rig.tx.put_bytes(DATA, &frame(OTHER, 60));
    for _ in 0..3 {
        rig.transmit(&[(DATA, 72, false)]);
        returned(&mut rig.tx, &rig.notices);
    }
    assert_eq!(rig.status(), 0);
    rig.stop();
    let told: Vec<_> = rig.notices.try_iter().collect();
    assert!(!told.iter().any(|notice| matches!(notice, Notice::Reset(_))));
    assert_eq!(
        (rig.counters()["tx_errors"], rig.counters()["tx_dropped"]),
        (1, 2)
    );
}

#[test]
fn a_server_that_ends_takes_the_link_down_until_one_listens_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let stream = net::Stream::connect(&path, 1).unwrap();
    let mut net = Net::new("net0", Box::new(stream), settings(1));
    let memory = memory();
    let [mut rx, mut tx] = [0, 1].map(|index| Driver::new(&memory, index, SIZE));
    // Whoever has room for a frame finds out that nobody sends any.
    rx.offer(&[(DATA + 0x1000, 512, true)]);
    let features = net.features();
    let queues = vec![rx.activate(), tx.activate()];
    let notices = start(&mut net, features, &memory, queues);
    tx.put_bytes(DATA, &frame(OTHER, 60));
    let status = |net: &Net| {
        let mut status = [0; 2];
        net.read_config(6, &mut status);
        status[0]
    };
    for _ in 0..2 {
        let (mut server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        while status(&net) == 0 {
            let notice = notices.recv_timeout(PATIENCE).unwrap();
            assert!(!matches!(notice, Notice::Reset(_)), "{notice:?}");
        }
        tx.offer(&[(DATA, 72, false)]);
        tx.kick();
        let mut got = [0; 64];
        io::Read::read_exact(&mut server, &mut got).unwrap();
        assert_eq!(got[4..], frame(OTHER, 60)[HEADER_LEN..]);
        returned(&mut tx, &notices);
    }
}

#[test]
fn a_link_that_is_set_down_drops_frames_of_both_directions_until_it_is_up() {
    let mut rig = Rig::new();
    assert_eq!(rig.change(json!({ "link": "down" })), Reconfigured::Seen);
    assert_eq!(rig.change(json!({ "link": "down" })), Reconfigured::Unseen);
    assert_eq!(rig.status(), 0);
    let seen = rig.net.counters().unwrap();
    assert_eq!(seen.link(), Some(false));
    rig.post(DATA, 512);
    rig.tx.put_bytes(DATA + 0x1000, &frame(OTHER, 60));
    rig.transmit(&[(DATA + 0x1000, 72, false)]);
    returned(&mut rig.tx, &rig.notices);
    rig.peer.send(&frame(MAC, 60)).unwrap();
    let patience = soon();
    while rig.counters()["rx_dropped"] == 0 {
        assert!(Instant::now() < patience);
        std::thread::yield_now();
    }
    assert_eq!(rig.change(json!({ "link": "up" })), Reconfigured::Seen);
    assert_eq!(rig.status(), 1);
    assert_eq!(seen.link(), Some(true));
    let sent = frame(MAC, 80);
    rig.peer.send(&sent).unwrap();
    assert_eq!(returned(&mut rig.rx, &rig.notices), (0, 92));
    let counters = rig.counters();
    assert_eq!((counters["tx_dropped"], counters["tx_frames"]), (1, 0));
}

#[test]
fn buffers_and_frames_survive_a_stop_and_a_start() {
    let mut rig = Rig::new();
    for buffer in 0..5 {
        rig.rx.offer(&[(DATA + buffer * 0x1000, 512, true)]);
    }
    rig.peer.send(&frame(MAC, 100)).unwrap();
    rig.rx.kick();
    assert_eq!(returned(&mut rig.rx, &rig.notices), (0, 112));
    let queues = rig.stop();
    // Posted buffers are in the ring again, as if nobody had taken them.
    assert!(queues[0].parked.is_empty());
    assert_eq!(queues[0].queue.next_avail(), 1);
    rig.peer.send(&frame(MAC, 200)).unwrap();
    let features = rig.net.features();
    let memory = rig.memory.clone();
    rig.notices = start(&mut rig.net, features, &memory, queues);
    assert_eq!(returned(&mut rig.rx, &rig.notices), (1, 212));
    rig.tx.put_bytes(DATA + 0x8000, &frame(OTHER, 60));
    rig.transmit(&[(DATA + 0x8000, 72, false)]);
    assert_eq!(rig.arrived().len(), 72);
}

#[test]
fn a_head_that_is_offered_twice_is_parked_once() {
    let mut rig = Rig::new();
    let head = rig.rx.offer(&[(DATA, 64, true)]);
    rig.rx.offer_head(head);
    rig.rx.kick();
    rig.rx.kick_and_wait();
    let queues = rig.stop();
    assert!(queues[0].parked.len() <= 1, "{:?}", queues[0].parked);
}

#[test]
fn a_ring_that_jumps_breaks_the_device() {
    let mut rig = Rig::new();
    rig.tx.set_avail_index(SIZE + 1);
    rig.tx.kick();
    assert!(reset_reason(&rig.notices).contains("queue 1"));
    rig.stop();
}
