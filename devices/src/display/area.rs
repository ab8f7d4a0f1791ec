//! Rectangles of pixels, and how many of them make up a changed picture.

/// A picture's size in pixels, each side at most 16384.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Pixels of a line.
    pub width: u16,
    /// Lines.
    pub height: u16,
}

impl Size {
    /// All of it.
    #[must_use]
    pub fn area(self) -> Rect {
        Rect {
            x: 0,
            y: 0,
            width: self.width,
            height: self.height,
        }
    }

    /// Its pixels.
    #[must_use]
    pub fn pixels(self) -> usize {
        usize::from(self.width) * usize::from(self.height)
    }
}

/// Pixels of a picture, from `x`, `y`. May be empty, and may reach past the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rect {
    /// Pixels to the left of it.
    pub x: u16,
    /// Lines above it.
    pub y: u16,
    /// Pixels of a line.
    pub width: u16,
    /// Lines.
    pub height: u16,
}

impl Rect {
    /// Whether there is no pixel in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.width == 0 || self.height == 0
    }

    /// The first column to the right of it.
    #[must_use]
    pub fn right(&self) -> u16 {
        self.x.saturating_add(self.width)
    }

    /// The first line below it.
    #[must_use]
    pub fn bottom(&self) -> u16 {
        self.y.saturating_add(self.height)
    }

    /// What both have; empty where they have nothing in common.
    #[must_use]
    pub fn clipped(&self, other: &Self) -> Self {
        let (x, y) = (self.x.max(other.x), self.y.max(other.y));
        Self {
            x,
            y,
            width: self.right().min(other.right()).saturating_sub(x),
            height: self.bottom().min(other.bottom()).saturating_sub(y),
        }
    }

    /// The smallest rectangle around both.
    #[must_use]
    pub fn with(&self, other: &Self) -> Self {
        if self.is_empty() {
            return *other;
        }
        if other.is_empty() {
            return *self;
        }
        let (x, y) = (self.x.min(other.x), self.y.min(other.y));
        Self {
            x,
            y,
            width: self.right().max(other.right()) - x,
            height: self.bottom().max(other.bottom()) - y,
        }
    }

    /// Whether all of `other` is in it.
    #[must_use]
    pub fn contains(&self, other: &Self) -> bool {
        self.x <= other.x
            && self.y <= other.y
            && self.right() >= other.right()
            && self.bottom() >= other.bottom()
    }

    /// Its pixels.
    #[must_use]
    pub fn pixels(&self) -> usize {
        usize::from(self.width) * usize::from(self.height)
    }

    /// The same in pieces at most `width` wide and of at most `pixels` pixels (but at least one line each).
    pub fn pieces(self, width: u16, pixels: u16) -> impl Iterator<Item = Self> {
        let lines = (pixels / self.width.clamp(1, width)).max(1);
        let columns = starts(self.x, self.right(), width);
        columns.flat_map(move |x| {
            starts(self.y, self.bottom(), lines).map(move |y| Self {
                x,
                y,
                width: (self.right() - x).min(width),
                height: (self.bottom() - y).min(lines),
            })
        })
    }
}

fn starts(from: u16, to: u16, step: u16) -> impl Iterator<Item = u16> {
    (from..to).step_by(usize::from(step.max(1)))
}

/// Collects runs of columns, line by line, into as few rectangles as they show to be.
#[derive(Debug, Default)]
pub struct Runs {
    done: Vec<Rect>,
    /// Those that end at the last line, from left to right.
    open: Vec<Rect>,
    next: Vec<Rect>,
}

impl Runs {
    /// Adds a run of the band that [`Runs::end_band`] ends; from left to right.
    pub fn add(&mut self, run: Rect) {
        let above = self
            .open
            .iter()
            .position(|open| open.x == run.x && open.width == run.width);
        match above {
            Some(at) => {
                let open = self.open.remove(at);
                self.next.push(open.with(&run));
            }
            None => self.next.push(run),
        }
    }

    /// The runs of a band are complete; the next begins right below.
    pub fn end_band(&mut self) {
        self.done.append(&mut self.open);
        std::mem::swap(&mut self.open, &mut self.next);
    }

    /// The rectangles.
    #[must_use]
    pub fn finish(mut self) -> Vec<Rect> {
        self.end_band();
        self.end_band();
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rect(x: u16, y: u16, width: u16, height: u16) -> Rect {
        Rect {
            x,
            y,
            width,
            height,
        }
    }

    #[test]
    fn rectangles_that_reach_past_all_bounds_are_clipped() {
        let screen = rect(0, 0, 100, 50);
        let all = rect(0, 0, u16::MAX, u16::MAX);
        assert_eq!(all.clipped(&screen), screen);
        let past = rect(u16::MAX, u16::MAX, u16::MAX, u16::MAX);
        assert!(past.clipped(&screen).is_empty());
        assert_eq!(
            rect(90, 40, u16::MAX, 5).clipped(&screen),
            rect(90, 40, 10, 5)
        );
        assert_eq!(past.clipped(&screen).with(&screen), screen);
    }

    #[test]
    fn pieces_cover_all_of_a_rectangle_once() {
        let whole = rect(3, 5, 100, 33);
        let mut seen = vec![0; 200 * 50];
        for piece in whole.pieces(40, 200) {
            assert!(piece.width <= 40 && piece.pixels() <= 200 && whole.contains(&piece));
            for y in piece.y..piece.bottom() {
                for x in piece.x..piece.right() {
                    seen[usize::from(y) * 200 + usize::from(x)] += 1;
                }
            }
        }
        assert_eq!(seen.iter().sum::<usize>(), whole.pixels());
        assert!(seen.iter().all(|count| *count <= 1));
        assert_eq!(rect(0, 0, 0, 9).pieces(4, 4).count(), 0);
    }

    #[test]
    fn equal_runs_below_each_other_are_one_rectangle() {
        let mut runs = Runs::default();
        for y in 0..3 {
            runs.add(rect(0, y * 16, 64, 16));
            runs.add(rect(128, y * 16, 64, 16));
            runs.end_band();
        }
        runs.end_band();
        runs.add(rect(0, 64, 64, 16));
        let mut found = runs.finish();
        found.sort_by_key(|rect| (rect.x, rect.y));
        assert_eq!(
            found,
            [
                rect(0, 0, 64, 48),
                rect(0, 64, 64, 16),
                rect(128, 0, 64, 48)
            ]
        );
    }
}
