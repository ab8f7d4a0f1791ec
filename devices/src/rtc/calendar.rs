//! Seconds since the Unix epoch to and from a date and a time of day.
//!
//! The proleptic Gregorian calendar, years 0 to 9999: what two digits of
//! century and two of year can tell.

/// Seconds in a day.
pub(super) const DAY: u32 = 86_400;

/// Days from 0000-03-01 to 1970-01-01.
const EPOCH_DAYS: i64 = 719_468;
/// Days in 400 years.
const ERA_DAYS: i64 = 146_097;
/// First second of the year 0.
pub(super) const FIRST_SECOND: i64 = -62_167_219_200;
/// Last second of the year 9999.
pub(super) const LAST_SECOND: i64 = 253_402_300_799;

/// A date and a time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    /// 0 to 9999.
    pub(super) year: u16,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    /// 1 (Sunday) to 7.
    pub(super) weekday: u8,
    /// 0 to 23.
    pub(super) hour: u8,
    /// 0 to 59.
    pub(super) minute: u8,
    /// 0 to 59.
    pub(super) second: u8,
}

/// A number that is known to lie in `u8`.
fn small(value: i64) -> u8 {
    u8::try_from(value).unwrap_or_default()
}

impl DateTime {
    /// The time `seconds` after the Unix epoch, held to years 0 to 9999.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let seconds = seconds.clamp(FIRST_SECOND, LAST_SECOND);
        let (days, of_day) = (
            seconds.div_euclid(DAY.into()),
            seconds.rem_euclid(DAY.into()),
        );
        // Count from a March, so that the leap day ends the year, and in eras
        // of 400 years, which all have the same length.
        let shifted = days + EPOCH_DAYS;
        let (era, of_era) = (shifted.div_euclid(ERA_DAYS), shifted.rem_euclid(ERA_DAYS));
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * of_year + 2) / 153;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        Self {
            year: u16::try_from(year).unwrap_or_default(),
            month: small(month),
            day: small(of_year - (153 * month_from_march + 2) / 5 + 1),
            // The epoch was a Thursday.
            weekday: small((days + 4).rem_euclid(7) + 1),
            hour: small(of_day / 3_600),
            minute: small(of_day / 60 % 60),
            second: small(of_day % 60),
        }
    }

    /// Seconds from the Unix epoch. Fields out of range count as the nearest
    /// value in range; a day past the month's end runs into the next month.
    /// The weekday is ignored.
    pub(super) fn to_seconds(self) -> i64 {
        let field = |value: u8, low: u8, high: u8| i64::from(value.clamp(low, high));
        let month = field(self.month, 1, 12);
        let year = i64::from(self.year.min(9_999)) - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let month_from_march = if month > 2 { month - 3 } else { month + 9 };
        let of_year = (153 * month_from_march + 2) / 5 + field(self.day, 1, 31) - 1;
        let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
        let days = era * ERA_DAYS + of_era - EPOCH_DAYS;
        let of_day = field(self.hour, 0, 23) * 3_600
            + field(self.minute, 0, 59) * 60
            + field(self.second, 0, 59);
        days * i64::from(DAY) + of_day
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(year: u16, month: u8, day: u8, weekday: u8) -> DateTime {
        DateTime {
            year,
            month,
            day,
            weekday,
            hour: 0,
            minute: 0,
            second: 0,
        }
    }

    #[test]
    fn known_dates_convert_both_ways() {
        for (seconds, date) in [
            (0, at(1970, 1, 1, 5)),
            (951_782_400, at(2000, 2, 29, 3)),
            (951_868_800, at(2000, 3, 1, 4)),
            (4_107_542_400, at(2100, 3, 1, 2)),
            (FIRST_SECOND, at(0, 1, 1, 7)),
            (LAST_SECOND + 1 - i64::from(DAY), at(9999, 12, 31, 6)),
        ] {
            assert_eq!(DateTime::from_seconds(seconds), date);
            assert_eq!(date.to_seconds(), seconds, "{date:?}");
        }
        let last = DateTime::from_seconds(i64::MAX);
        assert_eq!((last.year, last.hour, last.second), (9999, 23, 59));
    }

    #[test]
    fn fields_out_of_range_are_held_to_it() {
        let wild = DateTime {
            year: u16::MAX,
            month: 255,
            day: 255,
            weekday: 0,
            hour: 255,
            minute: 255,
            second: 255,
        };
        assert_eq!(wild.to_seconds(), LAST_SECOND);
        assert_eq!(
            at(2023, 2, 31, 0).to_seconds(),
            at(2023, 3, 3, 0).to_seconds()
        );
    }

    proptest! {
        #[test]
        fn every_second_converts_and_back(seconds in FIRST_SECOND..=LAST_SECOND) {
            prop_assert_eq!(DateTime::from_seconds(seconds).to_seconds(), seconds);
        }
    }
}
