use std::time::{SystemTime, UNIX_EPOCH};

const DAYS_PER_ERA: i64 = 146_097;
/// From 0000-03-01, the first day of an era, to 1970-01-01.
const DAYS_TO_1970: i64 = 719_468;

/// A time in seconds since 1970-01-01 UTC as text: `2026-11-23T16:02:14Z`.
pub(super) fn utc(seconds: i64) -> String {
    let (year, month, day) = civil_from_days(seconds.div_euclid(86_400));
    let second = seconds.rem_euclid(86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The time that `text` means, in seconds since 1970-01-01 UTC: a date, a date and a time of day, both in
/// UTC, or how long ago.
pub(super) fn parse(text: &str) -> Result<i64, String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_secs() as i64);
    ago(text)
        .and_then(|seconds| now.checked_sub(seconds))
        .or_else(|| moment(text))
        .ok_or_else(|| "write it as 2026-11-23, 2026-11-23T16:02:14Z, 90s, 30m, 2h or 7d".to_owned())
}

fn ago(text: &str) -> Option<i64> {
    let unit = seconds_in(text.chars().last()?)?;
    number(&text[..text.len() - 1])?.checked_mul(i64::from(unit))
}

/// How many seconds the unit of a length of time has.
pub(super) fn seconds_in(unit: char) -> Option<u32> {
    match unit {
        's' => Some(1),
        'm' => Some(60),
        'h' => Some(3600),
        'd' => Some(86_400),
        _ => None,
    }
}

/// `2026-11-23` or `2026-11-23T16:02:14Z`.
fn moment(text: &str) -> Option<i64> {
    let (date, time) = text.strip_suffix('Z').and_then(|text| text.split_once('T')).unwrap_or((text, "00:00:00"));
    let [year, month, day] = numbers(date, '-')?;
    let [hour, minute, second] = numbers(time, ':')?;
    let days = days_from_civil(year, month, day);
    // What is no date, such as the 30th of February, comes back as another one.
    let is_date = civil_from_days(days) == (year, month, day);
    let in_day = (0..24).contains(&hour) && (0..60).contains(&minute) && (0..60).contains(&second);
    (is_date && in_day).then_some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

fn numbers(text: &str, separator: char) -> Option<[i64; 3]> {
    let mut parts = text.split(separator).map(number);
    let numbers = [parts.next()??, parts.next()??, parts.next()??];
    parts.next().is_none().then_some(numbers)
}

/// Digits only, and not too many of them.
fn number(text: &str) -> Option<i64> {
    let digits = (1..=9).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

/// How many days after 1970-01-01 a date is: the reverse of [`civil_from_days`].
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * DAYS_PER_ERA + day_of_era - DAYS_TO_1970
}

/// The date that is `days` days after 1970-01-01 in the Gregorian calendar.
///
/// Years are counted from March, so that the leap day is the last day of a year, and in eras of 400
/// years, which all have the same 146,097 days.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let day_number = days.saturating_add(DAYS_TO_1970);
    let (era, day_of_era) = (day_number.div_euclid(DAYS_PER_ERA), day_number.rem_euclid(DAYS_PER_ERA));
    // Take away the leap days: one every 4 years, none every 100, one every 400.
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // From March on, months take 153 days in every five.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times_are_written_as_date_does() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (-1, "1969-12-31T23:59:59Z"),
            (951_827_696, "2000-02-29T12:34:56Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (1_795_449_734, "2026-11-23T16:02:14Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), text);
            assert_eq!(parse(text), Ok(seconds));
        }
        assert_eq!(parse("2026-11-23"), Ok(1_795_449_734 / 86_400 * 86_400));
    }

    #[test]
    fn how_long_ago_is_a_time_too() {
        let now = parse("0s").unwrap();
        for (text, seconds) in [("90s", 90), ("30m", 1800), ("2h", 7200), ("7d", 604_800)] {
            assert!((0..=5).contains(&(parse(text).unwrap() - now + seconds)), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "now",
            "h",
            "-1h",
            "1w",
            "é",
            "2026",
            "2026-13-01",
            "2026-02-30",
            "2026-00-10",
            "2026-11-23T16:02",
            "2026-11-23T24:00:00Z",
            "2026-11-23T16:60:00Z",
            "2026-11-23T16:02:14",
            "2026-11-23T16:02:14+01:00",
            "2026-11-23-1",
            "+2026-11-23",
            "99999999999999999999d",
            "0000000001s ",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_day_of_four_centuries_follows_the_one_before() {
        let leap = |year: i64| (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        let mut expected = (1970, 1, 1);
        for day in 0..146_097 {
            assert_eq!(civil_from_days(day), expected, "day {day}");
            assert_eq!(days_from_civil(expected.0, expected.1, expected.2), day);
            let (year, month, date) = expected;
            let length = match month {
                2 if leap(year) => 29,
                2 => 28,
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            expected = match (month, date) {
                (12, 31) => (year + 1, 1, 1),
                _ if date == length => (year, month + 1, 1),
                _ => (year, month, date + 1),
            };
        }
    }

    #[test]
    fn no_number_is_too_large() {
        utc(i64::MAX);
        utc(i64::MIN);
    }
}
