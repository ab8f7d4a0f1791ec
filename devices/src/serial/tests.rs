use std::io::ErrorKind;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::conformance::{self, Pulses};
use crate::output::tests::Script;

#[derive(Default)]
struct Readiness(AtomicUsize);

impl Readiness {
    fn take(&self) -> usize {
        self.0.swap(0, Ordering::Relaxed)
    }
}

impl InputReady for Readiness {
    fn ready(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Bench {
    port: Serial,
    line: Arc<Pulses>,
    host: Script,
    readiness: Arc<Readiness>,
}

impl Bench {
    fn new() -> Self {
        Self::with_host(Script::default())
    }

    fn with_host(host: Script) -> Self {
        let line = Arc::new(Pulses::default());
        let readiness = Arc::new(Readiness::default());
        let port = Serial::new(
            "com1",
            line.clone(),
            Box::new(host.clone()),
            readiness.clone(),
        );
        Self {
            port,
            line,
            host,
            readiness,
        }
    }

    fn listening() -> Self {
        let bench = Self::new();
        bench.out(IER, IER_RECEIVED);
        bench.line.take();
        bench
    }

    fn read(&self, register: u8) -> u8 {
        let mut data = [0xff];
        self.port.read(register.into(), &mut data);
        data[0]
    }

    fn out(&self, register: u8, value: u8) {
        self.port.write(register.into(), &[value]);
    }

    /// Reads received bytes as a driver does, by the line status.
    fn receive(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.read(LSR) & LSR_DATA_READY != 0 {
            bytes.push(self.read(DATA));
        }
        bytes
    }
}

#[test]
fn polled_output_reaches_the_host_and_the_transmitter_stays_empty() {
    let bench = Bench::new();
    for byte in b"early" {
        bench.out(DATA, *byte);
        assert_eq!(bench.read(LSR) & 0x60, 0x60);
    }
    assert_eq!(bench.host.text(), b"early");
    assert_eq!(bench.line.take(), 0);
}

#[test]
fn an_interrupt_driven_transmission_gets_an_interrupt_for_each_burst() {
    let bench = Bench::new();
    bench.out(IER, IER_TRANSMIT_EMPTY);
    for _ in 0..3 {
        assert_eq!(bench.line.take(), 1);
        assert_eq!(bench.read(IIR_FCR), 0xc2);
        assert_eq!(bench.read(IIR_FCR), 0xc1, "reading acknowledges");
        for byte in b"0123456789abcdef" {
            bench.out(DATA, *byte);
        }
    }
    assert_eq!(bench.host.text().len(), 48);
}

#[test]
fn linuxs_test_for_a_missing_transmit_interrupt_finds_none_missing() {
    let bench = Bench::new();
    for _ in 0..2 {
        bench.out(IER, IER_TRANSMIT_EMPTY);
        assert_eq!(bench.read(IIR_FCR), 0xc2);
        bench.out(IER, 0);
    }
    bench.out(IER, IER_TRANSMIT_EMPTY);
    bench.out(IER, 0);
    assert_eq!(bench.read(IIR_FCR), 0xc1, "a disabled cause does not show");
}

#[test]
fn linuxs_autoconfiguration_finds_a_16550a() {
    let bench = Bench::new();
    bench.out(IER, 0);
    assert_eq!(bench.read(IER) & 0x0f, 0);
    bench.out(IER, 0x0f);
    assert_eq!(bench.read(IER) & 0x0f, 0x0f);
    bench.out(IER, 0);
    // Loopback: RTS and OUT2 come back as CTS and DCD.
    bench.out(MCR, MCR_LOOP | 0x0a);
    assert_eq!(bench.read(6) & 0xf0, 0x90);
    bench.out(MCR, 0);
    for fcr in [0x01, 0x21] {
        bench.out(IIR_FCR, fcr);
        assert_eq!(bench.read(IIR_FCR) >> 5, 6, "FIFOs, but not of 64 bytes");
    }
    // An enhanced port would have a writable feature register here.
    bench.out(LCR, 0xbf);
    assert_ne!(bench.read(IIR_FCR), 0);
    bench.out(LCR, 0);
    bench.out(MCR, 0xe0);
    assert_eq!(bench.read(MCR), 0);
    bench.out(SCRATCH, 0xa5);
    assert_eq!(bench.read(SCRATCH), 0xa5);
}

#[test]
fn received_data_interrupts_and_stays_the_cause_until_it_is_read() {
    let bench = Bench::listening();
    assert_eq!(bench.port.input(b"ab"), 2);
    assert_eq!(bench.line.take(), 1);
    assert_eq!(bench.read(IIR_FCR), 0xc4);
    assert_eq!(bench.read(DATA), b'a');
    assert_eq!(bench.read(IIR_FCR), 0xc4, "one byte is left");
    assert_eq!(bench.read(DATA), b'b');
    assert_eq!(bench.read(IIR_FCR), 0xc1);
    assert_eq!(bench.port.input(b"c"), 1);
    assert_eq!(bench.line.take(), 1);
}

#[test]
fn received_data_does_not_hide_an_empty_transmitter_for_good() {
    for latch in [0, LCR_DIVISOR_LATCH] {
        let bench = Bench::listening();
        bench.port.input(b"a");
        bench.out(IER, IER_RECEIVED | IER_TRANSMIT_EMPTY);
        bench.out(LCR, latch);
        assert_eq!(bench.read(IIR_FCR), 0xc4);
        bench.out(LCR, 0);
        assert_eq!(bench.read(DATA), b'a');
        assert_eq!(bench.read(IIR_FCR), 0xc2);
        assert_eq!(bench.read(IIR_FCR), 0xc1);
        assert_eq!(bench.read(IER), 3);
    }
}

#[test]
fn input_past_the_fifo_is_refused_and_the_host_hears_of_room_once() {
    let bench = Bench::listening();
    let text: Vec<u8> = (0..200).collect();
    assert_eq!(bench.port.input(&text), FIFO_LEN);
    assert_eq!(bench.port.input(&text[64..]), 0);
    assert_eq!(bench.readiness.take(), 0);
    let mut received = Vec::new();
    for _ in 0..REFILL_LEN {
        assert_eq!(bench.readiness.take(), 0);
        received.push(bench.read(DATA));
    }
    assert_eq!(bench.readiness.take(), 1);
    received.extend(bench.receive());
    assert_eq!(bench.readiness.take(), 0, "nothing has been refused since");
    assert_eq!(received, text[..64]);
}

#[test]
fn a_paste_of_any_length_arrives_whole() {
    let bench = Bench::listening();
    let text: Vec<u8> = (0..10_000_u32)
        .map(|i| u8::try_from(i % 251).unwrap())
        .collect();
    let (mut sent, mut received) = (0, Vec::new());
    while received.len() < text.len() {
        sent += bench.port.input(&text[sent..]);
        assert_ne!(bench.line.take(), 0, "stuck after {} bytes", received.len());
        received.extend(bench.receive());
    }
    assert_eq!(received, text);
}

#[test]
fn input_waits_for_the_driver_to_start_and_none_of_it_is_lost() {
    let bench = Bench::new();
    assert_eq!(bench.port.input(b"uname"), 0);
    // Linux starts the port: clear the FIFOs, read everything, test the transmitter.
    for fcr in [0x01, 0x07, 0x00] {
        bench.out(IIR_FCR, fcr);
    }
    for register in [LSR, DATA, IIR_FCR, 6] {
        bench.read(register);
    }
    bench.out(LCR, 0x03);
    bench.read(LSR);
    bench.out(IER, IER_TRANSMIT_EMPTY);
    bench.read(LSR);
    bench.read(IIR_FCR);
    bench.out(IER, 0);
    for register in [LSR, DATA, IIR_FCR, 6] {
        bench.read(register);
    }
    assert_eq!(bench.port.input(b"uname"), 0);
    assert_eq!(bench.readiness.take(), 0);
    bench.out(IER, 0x05);
    assert_eq!(bench.readiness.take(), 1);
    assert_eq!(bench.port.input(b"uname"), 5);
    assert_eq!(bench.receive(), b"uname");
}

#[test]
fn a_guest_that_polls_the_line_status_gets_input() {
    let bench = Bench::new();
    bench.read(LSR);
    bench.out(DATA, b'>');
    bench.read(LSR);
    assert_eq!(bench.port.input(b"x"), 0, "waiting to send is no polling");
    bench.read(LSR);
    assert_eq!(bench.readiness.take(), 1);
    assert_eq!(bench.port.input(b"x"), 1);
    assert_eq!(bench.receive(), b"x");
    assert_eq!(bench.line.take(), 0);
    // Once it uses interrupts, turning them off means that it does not listen.
    bench.out(IER, IER_RECEIVED);
    bench.out(IER, 0);
    assert_eq!(bench.port.input(b"x"), 0);
}

#[test]
fn input_that_arrived_while_the_console_masked_interrupts_is_announced() {
    let bench = Bench::listening();
    bench.port.input(b"a");
    bench.read(IIR_FCR);
    bench.line.take();
    bench.out(IER, 0);
    assert_eq!(bench.port.input(b"b"), 0);
    bench.out(IER, IER_RECEIVED);
    assert_eq!((bench.line.take(), bench.readiness.take()), (1, 1));
}

#[test]
fn the_fifo_control_register_clears_the_receiver() {
    for latch in [0, LCR_DIVISOR_LATCH] {
        let bench = Bench::listening();
        bench.port.input(&[b'a'; 64]);
        bench.out(LCR, latch);
        bench.out(IIR_FCR, 0x01);
        assert_eq!(bench.read(LSR) & 1, 1);
        bench.out(IIR_FCR, 0x03);
        assert_eq!(bench.read(LSR) & 1, 0);
        assert_eq!(bench.read(IIR_FCR), 0xc1);
        assert_eq!(bench.read(LCR), latch);
    }
}

#[test]
fn loopback_returns_what_is_sent_and_keeps_the_host_out() {
    let bench = Bench::listening();
    bench.out(MCR, MCR_LOOP);
    bench.out(DATA, b'l');
    assert_eq!(bench.line.take(), 1);
    assert_eq!(bench.port.input(b"h"), 0);
    assert_eq!(bench.receive(), b"l");
    for _ in 0..1000 {
        bench.out(DATA, b'l');
    }
    assert_eq!(bench.receive().len(), FIFO_LEN);
    assert_eq!(bench.readiness.take(), 0);
    bench.out(MCR, 0);
    assert_eq!(bench.readiness.take(), 1);
    assert!(bench.host.text().is_empty());
}

#[test]
fn a_divisor_of_zero_is_stored_and_changes_nothing() {
    let bench = Bench::new();
    bench.out(LCR, LCR_DIVISOR_LATCH);
    bench.out(DATA, 0);
    bench.out(IER, 0);
    assert_eq!((bench.read(DATA), bench.read(IER)), (0, 0));
    bench.out(LCR, 0x03);
    bench.out(DATA, b'z');
    assert_eq!(bench.host.text(), b"z");
}

#[test]
fn output_that_the_host_refuses_is_dropped_and_the_guest_goes_on() {
    let refusals = [ErrorKind::WouldBlock, ErrorKind::BrokenPipe];
    let bench = Bench::with_host(Script::with(refusals.map(|kind| Err(kind.into()))));
    bench.out(IER, IER_TRANSMIT_EMPTY);
    bench.read(IIR_FCR);
    bench.line.take();
    bench.out(DATA, b'a');
    assert_eq!(bench.line.take(), 1);
    assert_eq!(bench.read(LSR) & 0x60, 0x60);
    bench.out(DATA, b'b');
    bench.out(DATA, b'c');
    assert_eq!(bench.host.text(), b"c");
    assert_eq!(bench.port.dropped_output(), 2);
}

#[test]
fn reset_empties_the_port_but_keeps_its_output_and_what_it_owes() {
    let bench = Bench::listening();
    bench.port.input(&[b'a'; 65]);
    bench.port.reset();
    assert_eq!((bench.read(IER), bench.read(LSR)), (0, 0x60));
    assert_eq!(bench.readiness.take(), 0);
    bench.out(IER, IER_RECEIVED);
    assert_eq!(bench.readiness.take(), 1);
    bench.out(DATA, b'b');
    assert_eq!(bench.host.text(), b"b");
}

#[test]
fn input_in_the_fifo_survives_saving() {
    let bench = Bench::listening();
    bench.port.input(b"abc");
    bench.read(DATA);
    let copy = Bench::new();
    let mut set = SectionSet::default();
    set.push(bench.port.save().unwrap().remove(0));
    copy.port.restore(&mut set).unwrap();
    assert_eq!(copy.receive(), b"bc");
    assert_eq!(copy.port.input(b"d"), 1);
    copy.out(DATA, b'x');
    assert_eq!(copy.host.text(), b"x");
}

#[test]
fn any_access_is_answered_and_state_round_trips() {
    conformance::check(8, || Bench::new().port);
    conformance::check(8, || {
        let bench = Bench::listening();
        bench.port.input(b"0123456789abcdefghijklmnopqrst");
        bench.port
    });
}

#[test]
fn state_that_no_port_is_in_is_refused() {
    let port = Bench::new().port;
    let good = port.registers().save().unwrap();
    let refused = |why: &str, change: fn(&mut SerialV1)| {
        let mut state = good.clone();
        change(&mut state);
        conformance::assert_refused(&port, &state, why);
    };
    refused("interrupt enable", |s| s.interrupt_enable = 0x10);
    refused("modem control", |s| s.modem_control = 0x20);
    refused("FIFO too long", |s| s.fifo = vec![0; FIFO_LEN + 1]);
    refused("nothing received", |s| s.received_pending = true);
    refused("line status reads", |s| s.status_reads = POLLING + 1);
}
