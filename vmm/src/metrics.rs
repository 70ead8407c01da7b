//! What a sandbox has done, how long that took, and what it has: OpenMetrics text, which Prometheus reads.

use std::fmt;
use std::iter::successors;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::pager::{OwnPages, PagerStats};
use crate::proc_stat::ProcStat;

/// Part of an operation: from its beginning until the phase is over.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Phase {
    operation: &'static str,
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StartPhase {
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cause {
    cause: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Was {
    was: &'static str,
}

/// From 100 us to 13 s, each bucket twice the one before.
fn seconds() -> Histogram {
    // The library's own function for this is all that would need libm, of which each sandbox's process would have pages of its own.
    let buckets = successors(Some(1e-4), |bound| Some(bound * 2.0));
    Histogram::new(buckets.take(18))
}

/// What is counted while a sandbox lives.
pub struct Metrics {
    operations: Family<Phase, Histogram, fn() -> Histogram>,
    children: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            operations: Family::new_with_constructor(seconds),
            children: Counter::default(),
        }
    }
}

/// What a sandbox is and has when it is asked.
pub struct Facts<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its name.
    pub name: &'a str,
    /// How long it has lived.
    pub uptime: Duration,
    /// Resident memory of its process, in bytes.
    pub resident_bytes: u64,
    /// What of that no other process has.
    pub private_bytes: u64,
    /// The phases of its start, each counted from the beginning.
    pub start: Vec<(&'static str, Duration)>,
    /// Guest memory that is its own, where the host tells.
    pub own_pages: Option<OwnPages>,
    /// What its pager has done, if it has one.
    pub pager: Option<PagerStats>,
}

impl Metrics {
    /// Notes how long the phases of an operation took, each from its beginning, in microseconds.
    pub fn took(&self, operation: &'static str, phases: &[(&'static str, u64)]) {
        for &(phase, us) in phases {
            let phase = Phase { operation, phase };
            let time = Duration::from_micros(us).as_secs_f64();
            self.operations.get_or_create(&phase).observe(time);
        }
    }

    /// Counts children that were made.
    pub fn add_children(&self, count: usize) {
        self.children.inc_by(count as u64);
    }

    /// All of it as text, with what is so now.
    pub fn text(&self, facts: Facts<'_>) -> Result<String, fmt::Error> {
        let labels = [("sandbox", facts.name), ("id", facts.id)];
        let labels = labels.map(|(name, value)| (name.into(), value.to_owned().into()));
        let mut registry = Registry::with_prefix_and_labels("bough", labels.into_iter());
        registry.register_with_unit(
            "operation",
            "Time from the beginning of an operation on the sandbox until a phase of it was over; pause: until the guest ran again",
            Unit::Seconds,
            self.operations.clone(),
        );
        registry.register("children", "Children made", self.children.clone());
        let start = Family::<StartPhase, Gauge<f64, AtomicU64>>::default();
        for (phase, at) in facts.start {
            start
                .get_or_create(&StartPhase { phase })
                .set(at.as_secs_f64());
        }
        registry.register_with_unit(
            "start",
            "Time from the start of the process until a phase of the sandbox's start was over",
            Unit::Seconds,
            start,
        );
        registry.register_with_unit(
            "uptime",
            "How long the process has lived",
            Unit::Seconds,
            ConstGauge::new(facts.uptime.as_secs_f64()),
        );
        registry.register_with_unit(
            "resident",
            "Resident memory of the process, the guest's included",
            Unit::Bytes,
            ConstGauge::<u64>::new(facts.resident_bytes),
        );
        registry.register_with_unit(
            "private",
            "Resident memory that no other process has",
            Unit::Bytes,
            ConstGauge::<u64>::new(facts.private_bytes),
        );
        if let Some(pages) = facts.own_pages {
            let own = Family::<Was, Gauge<u64, AtomicU64>>::default();
            let was = |was, count| own.get_or_create(&Was { was }).set(count);
            was("shared", pages.copied);
            was("zero", pages.zeros);
            registry.register(
                "guest_own_pages",
                "Pages of guest memory, 4 KiB each, that it does not share: copies of shared pages, made when they were written to (all that were brought, where the pager brings them by faults), and pages that were zero until they were touched; a fault brought each",
                own,
            );
        }
        let faults = Family::<Cause, Counter>::default();
        let count = |cause, count| {
            faults.get_or_create(&Cause { cause }).inc_by(count);
        };
        let (minor, major) = host_faults();
        count("host-minor", minor);
        count("host-major", major);
        if let Some(pager) = facts.pager {
            count("stored-page", pager.data_faults);
            count("zero-page", pager.zero_faults);
            registry.register(
                "pages_ahead",
                "Pages of the working set that were brought before anybody asked",
                ConstCounter::new(pager.pages_ahead),
            );
            registry.register_with_unit(
                "fault_serving",
                "Time in which the pager served faults",
                Unit::Seconds,
                ConstCounter::new(pager.serving.as_secs_f64()),
            );
        }
        registry.register(
            "faults",
            "Page faults: the host kernel's of this process, without input and with it, and those that the pager served",
            faults,
        );
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// Faults of this process without and with input (proc_pid_stat(5), minflt and majflt); zeros where the host does not tell.
fn host_faults() -> (u64, u64) {
    let stat = ProcStat::read(std::process::id());
    let field = |number| {
        let field = stat.as_ref().and_then(|stat| stat.field(number));
        field.and_then(|field| field.parse().ok()).unwrap_or(0)
    };
    (field(10), field(12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_said_with_the_sandbox_s_name() {
        let metrics = Metrics::default();
        metrics.took("branch", &[("pause", 1_500), ("total", 40_000)]);
        metrics.took("branch", &[("pause", 2_500), ("total", 50_000)]);
        metrics.add_children(3);
        let text = metrics
            .text(Facts {
                id: "1",
                name: "one \"two\"",
                uptime: Duration::from_millis(1500),
                resident_bytes: 5,
                private_bytes: 4,
                start: vec![("first KVM_RUN", Duration::from_millis(12))],
                own_pages: Some(OwnPages {
                    copied: 3,
                    zeros: 2,
                }),
                pager: Some(PagerStats {
                    data_faults: 7,
                    ..PagerStats::default()
                }),
            })
            .unwrap();
        let sandbox = r#"sandbox="one \"two\"",id="1""#;
        for line in [
            format!(
                r#"bough_operation_seconds_sum{{{sandbox},operation="branch",phase="pause"}} 0.004"#
            ),
            format!(
                r#"bough_operation_seconds_count{{{sandbox},operation="branch",phase="total"}} 2"#
            ),
            format!(
                r#"bough_operation_seconds_bucket{{{sandbox},le="0.0016",operation="branch",phase="pause"}} 1"#
            ),
            format!("bough_children_total{{{sandbox}}} 3"),
            format!(r#"bough_start_seconds{{{sandbox},phase="first KVM_RUN"}} 0.012"#),
            format!("bough_uptime_seconds{{{sandbox}}} 1.5"),
            format!("bough_private_bytes{{{sandbox}}} 4"),
            format!(r#"bough_guest_own_pages{{{sandbox},was="shared"}} 3"#),
            format!(r#"bough_guest_own_pages{{{sandbox},was="zero"}} 2"#),
            format!(r#"bough_faults_total{{{sandbox},cause="stored-page"}} 7"#),
            "# EOF".to_owned(),
        ] {
            assert!(text.lines().any(|has| has == line), "{line}\n{text}");
        }
        let minor = text.lines().find(|line| line.contains("host-minor"));
        assert!(!minor.unwrap().ends_with(" 0"), "{minor:?}");
    }
}
