//! A chain: a layer, its parent, and so on to the root, as one source of pages.
//!
//! The layers' extents are merged once, so finding a page costs the same at any depth. What no layer has is zero.

use std::ops::Range;
use std::path::PathBuf;

use thiserror::Error;

use crate::Page;
use crate::digest::PageHash;
use crate::error::FormatError;
use crate::layer::{Extent, ExtentKind, Layer};

/// Most layers of a chain.
pub const DEPTH_MAX: usize = 64;

/// Layers do not make a chain.
#[derive(Debug, Error)]
pub enum ChainError {
    /// There is none.
    #[error("a chain has at least one layer")]
    Empty,
    /// There are too many.
    #[error(
        "a chain of {depth} layers is deeper than the {DEPTH_MAX} allowed: flatten one of its snapshots"
    )]
    TooDeep {
        /// How many.
        depth: usize,
    },
    /// They span different spaces.
    #[error("{}: spans {pages} pages, not {root}: it belongs to a VM of another size", file.display())]
    OtherSpace {
        /// The layer that differs from the root.
        file: PathBuf,
        /// Its pages.
        pages: u64,
        /// The pages that it should span.
        root: u64,
    },
}

/// Where a page comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A layer of the chain stores it.
    Data {
        /// Which: 0 is the root.
        layer: usize,
        /// Index of the (first) page among those that the layer stores.
        first_stored: u64,
    },
    /// It is zero.
    Zero,
}

/// A run of pages that come from one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub first_page: u64,
    /// How many: at least one.
    pub count: u64,
    /// Where the first comes from; with data, the others follow it in the file.
    pub source: Source,
}

impl Run {
    /// The page behind the last.
    pub fn end(&self) -> u64 {
        self.first_page + self.count
    }

    /// The part from page `from` to before `to`, which overlap the run.
    fn part(&self, from: u64, to: u64) -> Self {
        let first_page = self.first_page.max(from);
        Self {
            first_page,
            count: self.end().min(to) - first_page,
            source: match self.source {
                Source::Zero => Source::Zero,
                Source::Data {
                    layer,
                    first_stored,
                } => Source::Data {
                    layer,
                    first_stored: first_stored + (first_page - self.first_page),
                },
            },
        }
    }

    /// Whether `next` goes on where this run ends, in the space and so in the file: a layer stores its pages in ascending order.
    fn goes_on_with(&self, next: &Self) -> bool {
        let one_source = match (self.source, next.source) {
            (Source::Zero, Source::Zero) => true,
            (Source::Data { layer: own, .. }, Source::Data { layer, .. }) => own == layer,
            _ => false,
        };
        one_source && self.end() == next.first_page
    }
}

/// A chain of layers.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Layer>,
    total_pages: u64,
    /// Runs of data, ascending. What lies between them is zero.
    runs: Vec<Run>,
}

impl Chain {
    /// The chain of `layers`, the root first.
    pub fn new(layers: Vec<Layer>) -> Result<Self, ChainError> {
        let total_pages = layers.first().ok_or(ChainError::Empty)?.total_pages();
        if layers.len() > DEPTH_MAX {
            return Err(ChainError::TooDeep {
                depth: layers.len(),
            });
        }
        for layer in &layers {
            check_space(layer, total_pages)?;
        }
        let mut runs = merge(&layers, 0);
        runs.retain(|run| run.source != Source::Zero);
        Ok(Self {
            layers,
            total_pages,
            runs,
        })
    }

    /// The layers, the root first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Pages of the space.
    pub fn total_pages(&self) -> u64 {
        self.total_pages
    }

    /// The runs of pages that some layer stores, in ascending order, none longer than it lies in one file in one piece. All
    /// other pages are zero.
    pub fn data_runs(&self) -> &[Run] {
        &self.runs
    }

    /// What some of the layers have, as if there were no others, in ascending order. Pages that a layer says are zero are runs as well: it may hide others.
    ///
    /// # Panics
    ///
    /// If there are not so many layers.
    pub fn runs_of(&self, layers: Range<usize>) -> Vec<Run> {
        let first = layers.start;
        merge(&self.layers[layers], first)
    }

    /// Runs that cover the pages from `first_page` to before `end`, zeros included.
    pub fn runs(&self, first_page: u64, end: u64) -> impl Iterator<Item = Run> {
        let end = end.min(self.total_pages);
        let first = self.runs.partition_point(|run| run.end() <= first_page);
        let mut data = self.runs[first..].iter().peekable();
        let mut next = first_page;
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let run = match data.peek() {
                Some(run) if run.first_page <= next => data.next()?.part(next, end),
                after => {
                    let until = after.map_or(end, |run| run.first_page.min(end));
                    Run {
                        first_page: next,
                        count: until - next,
                        source: Source::Zero,
                    }
                }
            };
            next = run.end();
            Some(run)
        })
    }

    /// Where `page` comes from. What lies behind the space is zero.
    pub fn lookup(&self, page: u64) -> Source {
        let index = self.runs.partition_point(|run| run.end() <= page);
        match self.runs.get(index) {
            Some(run) if run.first_page <= page => run.part(page, page + 1).source,
            _ => Source::Zero,
        }
    }

    /// The hash of `page`; `None` where it is zero.
    pub fn hash_of(&self, page: u64) -> Result<Option<PageHash>, FormatError> {
        match self.lookup(page) {
            Source::Zero => Ok(None),
            Source::Data {
                layer,
                first_stored,
            } => self.layers[layer].hash_of(first_stored).map(Some),
        }
    }

    /// Reads `page` and checks it. An error names the layer and the page.
    pub fn read_page(&self, page: u64, bytes: &mut Page) -> Result<(), FormatError> {
        match self.lookup(page) {
            Source::Zero => {
                bytes.fill(0);
                Ok(())
            }
            Source::Data {
                layer,
                first_stored,
            } => self.layers[layer].read_stored(first_stored, page, bytes),
        }
    }

    /// Checks that `other` spans as many pages.
    pub fn check_space(&self, other: &Self) -> Result<(), ChainError> {
        other
            .layers
            .iter()
            .try_for_each(|layer| check_space(layer, self.total_pages))
    }

    /// Reads every stored page of every layer and checks it.
    pub fn verify(&self) -> Result<(), FormatError> {
        self.layers.iter().try_for_each(Layer::verify)
    }
}

fn check_space(layer: &Layer, total_pages: u64) -> Result<(), ChainError> {
    if layer.total_pages() == total_pages {
        return Ok(());
    }
    Err(ChainError::OtherSpace {
        file: layer.path().to_owned(),
        pages: layer.total_pages(),
        root: total_pages,
    })
}

/// The runs of `layers`, the first of which is layer number `first`. Halves are merged, so the cost grows with the
/// extents and the logarithm of the depth.
fn merge(layers: &[Layer], first: usize) -> Vec<Run> {
    match layers {
        [] => Vec::new(),
        [layer] => layer
            .extents()
            .iter()
            .map(|extent| run_of(extent, first))
            .collect(),
        _ => {
            let (lower, upper) = layers.split_at(layers.len() / 2);
            overlay(&merge(lower, first), &merge(upper, first + lower.len()))
        }
    }
}

fn run_of(extent: &Extent, layer: usize) -> Run {
    Run {
        first_page: extent.first_page,
        count: extent.count,
        source: match extent.kind {
            ExtentKind::Zero => Source::Zero,
            ExtentKind::Data { first_stored } => Source::Data {
                layer,
                first_stored,
            },
        },
    }
}

/// `upper`, and `lower` where it shows between.
fn overlay(lower: &[Run], upper: &[Run]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::with_capacity(lower.len() + upper.len());
    let mut push = |run: Run| match runs.last_mut() {
        Some(last) if last.goes_on_with(&run) => last.count += run.count,
        _ => runs.push(run),
    };
    let mut lower = lower.iter().copied().peekable();
    let mut covered = 0;
    let ends = upper.iter().copied().map(Some).chain([None]);
    for top in ends {
        let gap_end = top.map_or(u64::MAX, |run| run.first_page);
        while let Some(run) = lower.peek() {
            if run.end() > covered {
                if covered.max(run.first_page) >= gap_end {
                    break;
                }
                push(run.part(covered, gap_end));
                if run.end() > gap_end {
                    break;
                }
            }
            lower.next();
        }
        if let Some(run) = top {
            push(run);
            covered = run.end();
        }
    }
    runs
}
