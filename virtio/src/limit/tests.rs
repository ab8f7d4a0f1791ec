use std::sync::atomic::AtomicU64;

use proptest::prelude::*;

use super::*;

/// A clock that stands until it is set forward.
#[derive(Clone)]
struct Hands {
    origin: Instant,
    nanoseconds: Arc<AtomicU64>,
}

impl Hands {
    fn new() -> Self {
        Self {
            origin: Instant::now(),
            nanoseconds: Arc::default(),
        }
    }

    fn clock(&self) -> Clock {
        let hands = self.clone();
        Arc::new(move || {
            hands.origin + Duration::from_nanos(hands.nanoseconds.load(Ordering::SeqCst))
        })
    }

    fn pass(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap();
        self.nanoseconds.fetch_add(nanoseconds, Ordering::SeqCst);
    }
}

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn bucket(size: u64, one_time_burst: u64, refill_time: u64) -> Option<Bucket> {
    Some(Bucket {
        size,
        one_time_burst,
        refill_time,
    })
}

fn throttle(bandwidth: Option<Bucket>, ops: Option<Bucket>) -> Throttle {
    Throttle {
        own: Arc::new(Limiter::new(RateLimits { bandwidth, ops })),
        group: None,
    }
}

#[test]
fn without_limits_everything_goes_and_the_clock_is_not_read() {
    let clock: Clock = Arc::new(|| panic!("the clock was read"));
    for throttle in [
        Throttle::default(),
        throttle(bucket(0, 5, 1), bucket(1, 5, 0)),
        Throttle {
            group: Some(Arc::default()),
            ..Throttle::default()
        },
    ] {
        for _ in 0..1000 {
            assert_eq!(throttle.take(u64::MAX, &clock), Ok(()));
        }
    }
}

#[test]
fn a_full_bucket_is_used_at_once_and_then_fills_evenly() {
    let hands = Hands::new();
    let throttle = throttle(None, bucket(10, 0, 100));
    for _ in 0..10 {
        assert_eq!(throttle.take(0, &hands.clock()), Ok(()));
    }
    assert_eq!(throttle.take(0, &hands.clock()), Err(ms(10)));
    hands.pass(ms(4));
    assert_eq!(throttle.take(0, &hands.clock()), Err(ms(6)));
    hands.pass(ms(6));
    assert_eq!(throttle.take(0, &hands.clock()), Ok(()));
    assert_eq!(throttle.take(0, &hands.clock()), Err(ms(10)));
    // However long nothing happens, it does not hold more than its size.
    hands.pass(ms(1_000_000));
    for _ in 0..10 {
        assert_eq!(throttle.take(0, &hands.clock()), Ok(()));
    }
    assert_eq!(throttle.take(0, &hands.clock()), Err(ms(10)));
}

#[test]
fn the_one_time_burst_comes_first_and_does_not_come_again() {
    let hands = Hands::new();
    let throttle = throttle(bucket(100, 50, 100), None);
    assert_eq!(throttle.take(50, &hands.clock()), Ok(()));
    assert_eq!(throttle.take(100, &hands.clock()), Ok(()));
    assert_eq!(throttle.take(1, &hands.clock()), Err(ms(1)));
    hands.pass(ms(1000));
    assert_eq!(throttle.take(100, &hands.clock()), Ok(()));
    assert_eq!(throttle.take(1, &hands.clock()), Err(ms(1)));
}

#[test]
fn a_request_larger_than_the_bucket_goes_and_is_paid_for_afterwards() {
    let hands = Hands::new();
    let throttle = throttle(bucket(100, 0, 100), None);
    assert_eq!(throttle.take(1000, &hands.clock()), Ok(()));
    assert_eq!(throttle.take(1, &hands.clock()), Err(ms(901)));
    hands.pass(ms(901));
    assert_eq!(throttle.take(1, &hands.clock()), Ok(()));
    assert_eq!(throttle.take(1, &hands.clock()), Err(ms(1)));
}

#[test]
fn both_limits_hold_and_one_that_refuses_leaves_the_other_alone() {
    let hands = Hands::new();
    let throttle = throttle(bucket(100, 0, 100), bucket(2, 0, 1000));
    assert_eq!(throttle.take(100, &hands.clock()), Ok(()));
    assert_eq!(throttle.take(1, &hands.clock()), Err(ms(1)));
    hands.pass(ms(1));
    assert_eq!(throttle.take(1, &hands.clock()), Ok(()));
    hands.pass(ms(100));
    assert_eq!(throttle.take(1, &hands.clock()), Err(ms(399)));
    hands.pass(ms(399));
    assert_eq!(throttle.take(1, &hands.clock()), Ok(()));
}

#[test]
fn devices_of_a_group_share_its_limits_and_keep_their_own() {
    let hands = Hands::new();
    let shared = RateLimits {
        bandwidth: None,
        ops: bucket(3, 0, 300),
    };
    let groups: RateGroups = [("g".to_owned(), shared)].into_iter().collect();
    let [mut a, b] = [0, 1].map(|_| Throttle {
        own: Arc::default(),
        group: groups.get("g"),
    });
    a.own = Arc::new(Limiter::new(RateLimits {
        bandwidth: None,
        ops: bucket(1, 0, 1000),
    }));
    assert!(groups.get("h").is_none());
    assert_eq!(a.take(0, &hands.clock()), Ok(()));
    assert_eq!(a.take(0, &hands.clock()), Err(ms(1000)));
    assert_eq!(b.take(0, &hands.clock()), Ok(()));
    // What the first was refused was not taken from the group.
    assert_eq!(b.take(0, &hands.clock()), Ok(()));
    assert_eq!(b.take(0, &hands.clock()), Err(ms(100)));
}

#[test]
fn new_limits_hold_at_once_and_those_that_stay_keep_their_level() {
    let hands = Hands::new();
    let throttle = throttle(bucket(10, 0, 100), bucket(1, 0, 1000));
    assert_eq!(throttle.take(10, &hands.clock()), Ok(()));
    assert_eq!(throttle.take(1, &hands.clock()), Err(ms(1000)));
    let limits = RateLimits {
        bandwidth: bucket(10, 0, 100),
        ops: None,
    };
    throttle.own.set(limits);
    assert_eq!(throttle.own.limits(), limits);
    assert_eq!(throttle.take(1, &hands.clock()), Err(ms(10)));
    throttle.own.set(RateLimits::default());
    assert_eq!(throttle.take(1, &hands.clock()), Ok(()));
}

#[test]
fn a_clock_that_goes_back_gives_nothing() {
    let hands = Hands::new();
    hands.pass(ms(500));
    let throttle = throttle(None, bucket(1, 0, 100));
    assert_eq!(throttle.take(0, &hands.clock()), Ok(()));
    let earlier = Hands {
        origin: hands.origin,
        nanoseconds: Arc::default(),
    };
    assert_eq!(throttle.take(0, &earlier.clock()), Err(ms(100)));
    assert_eq!(throttle.take(0, &hands.clock()), Err(ms(100)));
}

#[test]
fn the_largest_numbers_there_are_do_not_overflow() {
    let hands = Hands::new();
    let slow = throttle(bucket(1, 0, u64::MAX), bucket(u64::MAX, u64::MAX, u64::MAX));
    assert_eq!(slow.take(u64::MAX, &hands.clock()), Ok(()));
    assert_eq!(slow.take(u64::MAX, &hands.clock()), Err(LONGEST_WAIT));
    let fast = throttle(bucket(u64::MAX, 0, 1), None);
    assert_eq!(fast.take(u64::MAX, &hands.clock()), Ok(()));
    assert!(fast.take(1, &hands.clock()).unwrap_err() <= ms(2));
}

proptest! {
    /// Whatever the requests and the pauses between them, no more is let
    /// through than the bucket held, what has come in since, and the last request.
    #[test]
    fn the_rate_is_kept(
        size in 1_u64..10_000,
        refill in 1_u64..10_000,
        burst in 0_u64..1000,
        steps in prop::collection::vec((0_u64..20_000, 0_u64..5_000_000), 1..200),
    ) {
        let hands = Hands::new();
        let throttle = throttle(bucket(size, burst, refill), None);
        let (mut let_through, mut passed) = (0_u128, 0_u128);
        for (bytes, pause) in steps {
            if throttle.take(bytes, &hands.clock()).is_ok() {
                let_through += u128::from(bytes);
                let came = passed * u128::from(size) / (u128::from(refill) * 1_000_000) + 1;
                prop_assert!(let_through <= u128::from(size + burst) + came + u128::from(bytes));
            }
            hands.pass(Duration::from_nanos(pause));
            passed += u128::from(pause);
        }
    }

    /// Who waits as long as told may go, and not before.
    #[test]
    fn a_wait_is_as_long_as_it_must_be(size in 1_u64..1_000_000, refill in 1_u64..100_000, debt in 1_u64..1000) {
        let hands = Hands::new();
        let throttle = throttle(bucket(size, 0, refill), None);
        prop_assert_eq!(throttle.take(size.saturating_add(debt), &hands.clock()), Ok(()));
        let wait = throttle.take(1, &hands.clock()).unwrap_err();
        if wait < LONGEST_WAIT {
            hands.pass(wait - Duration::from_nanos(1));
            prop_assert!(throttle.take(1, &hands.clock()).is_err());
            hands.pass(Duration::from_nanos(1));
            prop_assert_eq!(throttle.take(1, &hands.clock()), Ok(()));
        }
    }
}
