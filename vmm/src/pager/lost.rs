//! Pages of mapped memory that are gone: their layer was cut short, or the host cannot read it.
//!
//! Nobody is asked when a mapped page is brought, so this is found out afterwards: a thread of ours that touches such a page gets a SIGBUS, which
//! holds it. KVM gets none: its processor ends with some failure, its emulator takes the page for a device's, and where it looks for
//! the guest's page tables, the guest gets a page fault. So any end of the guest is looked at for a layer that is cut short.

use std::os::fd::AsFd;
use std::sync::Arc;

use snapshot_fmt::chain::{Chain, Source};
use snapshot_fmt::layer::Layer;
use snapshot_fmt::{PAGE_BYTES, PAGE_SIZE};

use super::PagerError;
use super::server::PageError;
use super::space::Space;
use crate::exit::{ExitLatch, Witness};
use crate::sys::bus_error::BusErrors;

/// Watches mapped memory for pages that are gone.
pub struct LostPages {
    chain: Arc<Chain>,
    space: Space,
    bus_errors: BusErrors,
}

impl LostPages {
    /// Watches `space`, where `chain` is mapped. What is found out ends the VM by `exit`.
    pub fn watch(
        chain: &Arc<Chain>,
        space: Space,
        exit: &ExitLatch,
    ) -> Result<Arc<Self>, PagerError> {
        let bus_errors = BusErrors::watch(space.addresses().collect(), exit.event().as_fd())
            .map_err(PagerError::Start)?;
        let lost = Arc::new(Self {
            chain: Arc::clone(chain),
            space,
            bus_errors,
        });
        exit.ask(Arc::clone(&lost) as Arc<dyn Witness>);
        Ok(lost)
    }

    /// From now on the guest runs, unless a page was missing before that.
    pub fn guest_starts(&self) -> Result<(), PageError> {
        self.bus_errors.guest_starts();
        self.touched().map_or(Ok(()), Err)
    }

    /// Whether somebody waits for a page for ever.
    pub fn is_waited_for(&self) -> bool {
        self.bus_errors.lost().is_some()
    }

    /// Whether all layers are as long as they were.
    pub fn check(&self) -> Result<(), PageError> {
        self.cut_off().map_or(Ok(()), Err)
    }

    /// The page that was touched in vain.
    fn touched(&self) -> Option<PageError> {
        let page = self.space.page_at(self.bus_errors.lost()?)?;
        Some(self.error(page))
    }

    /// The first page that is behind the end of its layer.
    fn cut_off(&self) -> Option<PageError> {
        let len = |layer: &Layer| layer.file().metadata().map_or(0, |metadata| metadata.len());
        let lens: Vec<u64> = self.chain.layers().iter().map(len).collect();
        self.chain.data_runs().iter().find_map(|run| {
            let Source::Data {
                layer,
                first_stored,
            } = run.source
            else {
                return None;
            };
            // The header's page, then the stored ones.
            let there = (lens.get(layer)? / PAGE_BYTES).saturating_sub(first_stored + 1);
            (there < run.count).then(|| self.error(run.first_page + there))
        })
    }

    /// What is wrong with `page`: who reads it, finds out.
    fn error(&self, page: u64) -> PageError {
        match self.chain.read_page(page, &mut [0; PAGE_SIZE]) {
            Err(source) => PageError::Layer { page, source },
            Ok(()) => PageError::Gone { page },
        }
    }
}

impl Witness for LostPages {
    fn reported(&self) -> Option<String> {
        self.touched().map(|error| error.to_string())
    }

    fn behind(&self) -> Option<String> {
        let lost = self.touched().or_else(|| self.cut_off());
        lost.map(|error| error.to_string())
    }
}
