package audit

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
)

// verifier holds lines against what came before them.
type verifier struct {
	check Check
	sum   Summary
	chain *chain
	last  Place
	found bool // the record that Check.Head names

	// What follows the last record and is none, until a start record explains it.
	broken *Broken
	region hash.Hash
	torn   []Place
}

func (v *verifier) line(p Place, line []byte, whole bool) error {
	v.last = p
	text, h, ok := unseal(line)
	switch {
	case !ok || !json.Valid(line):
		return v.noRecord(p, line)
	case !whole:
		return cmp.Or(v.broken, &Broken{p, "has no newline: it was cut, or is being written"})
	}
	var s Start
	if isStart := bytes.HasPrefix(line, []byte(`{"type":"start",`)); isStart {
		if json.Unmarshal(line, &s) != nil {
			return &Broken{p, "is no start record"}
		}
		return v.start(p, text, h, &s)
	}
	if v.broken != nil {
		return v.broken
	}
	if err := v.follows(p, h); err != nil {
		return err
	}
	if v.chain.sum(&v.sum.Head.Sum, text) != h.Sum {
		return &Broken{p, fmt.Sprintf("record %d was changed", h.Seq)}
	}
	return v.accept(p, line, h)
}

// noRecord takes in what is no record: a torn line, if the next start record says
// so, or else the end.
func (v *verifier) noRecord(p Place, line []byte) error {
	if v.broken == nil {
		v.broken = &Broken{p, "is no record"}
		v.region.Reset()
	} else {
		v.region.Write([]byte("\n"))
	}
	v.region.Write(line)
	v.torn = append(v.torn, p)
	if !json.Valid(line) {
		return nil
	}
	if len(v.torn) == 1 {
		v.broken.Reason = "carries no chain: it was written by an older version, or put in"
	}
	return v.broken
}

// follows holds the record's number against those before.
func (v *verifier) follows(p Place, h Head) error {
	last := v.sum.Head.Seq
	switch {
	case v.sum.Records == 0:
		return &Broken{p, fmt.Sprintf("record %d is the first here and no start record: what came before was cut off", h.Seq)}
	case h.Seq > last+1:
		return &gapError{Broken{p, missing(last+1, h.Seq-1)}, last + 1, h.Seq}
	case h.Seq <= last:
		return &Broken{p, fmt.Sprintf("record %d comes after record %d: out of order, or put in", h.Seq, last)}
	}
	return nil
}

// start judges a start record.
func (v *verifier) start(p Place, text []byte, h Head, s *Start) error {
	prev, err := hex.DecodeString(s.Prev)
	if err != nil || len(prev) != sha256.Size || hex.EncodeToString(prev) != s.Prev {
		return &Broken{p, "is no start record"}
	}
	from := [sha256.Size]byte(prev)
	anew := from == [sha256.Size]byte{}
	explained := v.broken == nil && s.Torn == "" || v.broken != nil && s.Torn == hex.EncodeToString(v.region.Sum(nil))
	switch {
	case v.chain.sum(&from, text) != h.Sum:
		return cmp.Or(v.broken, &Broken{p, fmt.Sprintf("record %d was changed", h.Seq)})
	case anew != (h.Seq == 1) || (s.Why == New) != (anew && s.Torn == "") || (s.Why == Torn) != (s.Torn != ""):
		return cmp.Or(v.broken, &Broken{p, "is no start record"})
	case !explained && v.broken != nil:
		return v.broken
	case !explained:
		return &Broken{p, "the torn line that was before it is not there"}
	case v.sum.Records > 0 && anew && !v.check.Restarts:
		return &Broken{p, "a chain starts anew: what came before may have been cut off"}
	case v.sum.Records > 0 && !anew:
		if err := v.follows(p, h); err != nil {
			return err
		}
		if from != v.sum.Head.Sum {
			return &Broken{p, fmt.Sprintf("record %d does not go on from record %d: one of them was replaced", h.Seq, h.Seq-1)}
		}
	}
	if v.sum.Records == 0 || anew {
		v.sum.Chains++
	}
	v.sum.Torn = append(v.sum.Torn, v.torn...)
	v.broken, v.torn = nil, nil
	return v.accept(p, []byte(text), h)
}

// accept moves on to a record that is in its place.
func (v *verifier) accept(p Place, line []byte, h Head) error {
	if v.check.Head != nil && h.Seq == v.check.Head.Seq {
		if h == *v.check.Head {
			v.found = true
		} else if !v.check.Restarts {
			return &Broken{p, fmt.Sprintf("record %d is not the one that is known: the chain was written anew", h.Seq)}
		}
	}
	if v.sum.Records == 0 {
		v.sum.First = h.Seq
	}
	v.sum.Records++
	v.sum.Head = h
	v.sum.Lost += lostBefore(line)
	return nil
}

// lostBefore is what a record says was lost before it. Its lost stands before seq.
func lostBefore(line []byte) (n uint64) {
	i := bytes.LastIndex(line, []byte(seqKey))
	i = bytes.LastIndex(line[:max(i, 0)], []byte(`,"lost":`))
	if i >= 0 {
		fmt.Sscanf(string(line[i:]), `,"lost":%d`, &n)
	}
	return n
}

// end judges what is not there.
func (v *verifier) end() error {
	switch want := v.check.Head; {
	case v.broken != nil:
		if v.broken.Reason == "is no record" && v.broken.Place == v.last {
			v.broken.Reason = "was not written to its end"
		}
		return v.broken
	case v.sum.Records == 0:
		return &Broken{v.last, "there are no records"}
	case want == nil || v.found:
	case v.sum.Head.Seq < want.Seq:
		return &Broken{v.last, fmt.Sprintf("the chain ends at record %d, but once had %d: the rest was cut off", v.sum.Head.Seq, want.Seq)}
	default:
		return &Broken{v.last, fmt.Sprintf("record %d, which is known, is not here: these begin at %d", want.Seq, v.sum.First)}
	}
	return nil
}

func missing(from, to uint64) string {
	if from == to {
		return fmt.Sprintf("record %d is missing before it", from)
	}
	return fmt.Sprintf("records %d–%d are missing before it", from, to)
}

// gapError is for a record that comes too early.
type gapError struct {
	Broken
	want, got uint64
}

// explain tells whether what is missing comes later.
func (g *gapError) explain(files []*reader) error {
	const far = 1 << 16 // lines
	n := 0
	later := false
	eachLine(files, func(_ Place, line []byte, _ bool) error {
		if _, h, ok := unseal(line); ok && h.Seq == g.want {
			later = true
		}
		if n++; later || n > far {
			return io.EOF
		}
		return nil
	})
	if later {
		g.Reason = fmt.Sprintf("record %d comes before record %d: out of order", g.got, g.want)
	}
	return &g.Broken
}
