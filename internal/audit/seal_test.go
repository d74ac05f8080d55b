package audit

import (
	"bytes"
	"testing"
)

// The chain costs a line no memory, beside the text.
func TestSealAllocatesNothing(t *testing.T) {
	c, text, buf := newChain(), bytes.Repeat([]byte("x"), 600), make([]byte, 0, 1<<10)
	got := testing.AllocsPerRun(100, func() {
		c.seal(append(buf, text...), 1)
		c.commit()
	})
	if got > 0 {
		t.Errorf("got %v allocations for a line", got)
	}
	if n := len(c.seal(append(buf, text...), 1<<63)) - len(text); n > sealSize {
		t.Errorf("got %d bytes more, want %d at most", n, sealSize)
	}
}

func BenchmarkSeal(b *testing.B) {
	c, text, buf := newChain(), bytes.Repeat([]byte("x"), 600), make([]byte, 0, 1<<10)
	b.ReportAllocs()
	for b.Loop() {
		c.seal(append(buf, text...), 0)
		c.commit()
	}
}
