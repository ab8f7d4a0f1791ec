use super::*;

fn report(usable: bool, hardware_virtualization: bool) -> Report {
    Report {
        usable,
        hardware_virtualization,
        cpus: 2,
        memory: 1 << 30,
        checks: vec![
            Check::ok("a", "is there"),
            Check::warn("long_name", "is not there", "get it"),
        ],
    }
}

#[test]
fn the_table_has_a_line_for_each_check_and_each_mend() {
    assert_eq!(
        report(true, true).to_string(),
        "ok    a          is there\n\
         warn  long_name  is not there\n                 mend: get it\n\n\
         This host can run machines.\n"
    );
}

#[test]
fn the_verdict_tells_small_guests_from_stock_kernels() {
    assert!(report(true, false).to_string().contains("no stock kernels"));
    assert!(
        report(false, true)
            .to_string()
            .contains("cannot run machines")
    );
}

#[test]
fn the_json_has_the_fields_that_programs_use() {
    let json = serde_json::to_value(report(true, false)).unwrap();
    assert_eq!(json["usable"], true);
    assert_eq!(json["hardware_virtualization"], false);
    assert_eq!(json["checks"][1]["status"], "warn");
    assert_eq!(json["checks"][1]["mend"], "get it");
    assert_eq!(json["checks"][0].get("mend"), None);
}

#[test]
fn every_check_of_this_host_that_is_not_ok_has_a_mend_and_a_name_of_its_own() {
    let report = examine(&Opener::new());
    for (index, check) in report.checks.iter().enumerate() {
        assert_eq!(
            check.mend.is_none(),
            check.status == Status::Ok,
            "{check:?}"
        );
        let mut rest = report.checks[index + 1..].iter();
        assert!(rest.all(|other| other.name != check.name), "{check:?}");
    }
    let failed = report.checks.iter().any(|c| c.status == Status::Fail);
    assert_eq!(report.usable, !failed);
}
