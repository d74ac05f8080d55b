package sim

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"
)

// maxBody bounds what the management API reads.
const maxBody = 1 << 20

// Manage returns the management API:
//
//	GET, PUT, DELETE /faults   the faults, as a JSON array; PUT replaces them all
//	GET, DELETE /history       the newest exchanges, oldest first
//	POST /events               schedules an event: {"scenario":"user-reboot","scale":60}
//	                           or one of your own, see eventRequest; answers {"eventId":"…"}
//	GET /jwks.json             what tokens are verified with
//	GET /ca.pem                what attested documents are verified with
//	GET /healthz               "ok"
//
// It asks nobody who they are and belongs on a listener that the machines under
// test cannot reach. Handler serves none of it.
func (s *Server) Manage() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /faults", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, 200, s.Faults()) })
	mux.HandleFunc("PUT /faults", s.putFaults)
	mux.HandleFunc("DELETE /faults", func(w http.ResponseWriter, _ *http.Request) {
		s.faults.set(nil, s.now()) // nothing in it that could be wrong
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET /history", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, 200, s.History()) })
	mux.HandleFunc("DELETE /history", func(w http.ResponseWriter, _ *http.Request) {
		s.ClearHistory()
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /events", s.postEvent)
	mux.HandleFunc("GET /jwks.json", func(w http.ResponseWriter, _ *http.Request) { writeBody(w, "application/json", s.keys.JWKS()) })
	mux.HandleFunc("GET /ca.pem", func(w http.ResponseWriter, _ *http.Request) {
		writeBody(w, "application/x-pem-file", s.keys.CAPEM())
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { writeBody(w, textType, []byte("ok\n")) })
	return mux
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(append(encode(v), '\n'))
}

func writeBody(w http.ResponseWriter, ctype string, body []byte) {
	w.Header().Set("Content-Type", ctype)
	w.Write(body)
}

// readJSON reads one JSON value with known keys only.
func readJSON(w http.ResponseWriter, r *http.Request, v any) error {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("read body: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("read body: want one JSON value")
	}
	return nil
}

func (s *Server) putFaults(w http.ResponseWriter, r *http.Request) {
	var faults []Fault
	err := readJSON(w, r, &faults)
	if err == nil {
		err = s.SetFaults(faults)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	writeJSON(w, http.StatusOK, s.Faults())
}

// eventRequest is the body of POST /events: a scenario by name, or the parts of
// an Event. Durations are as in 15m.
type eventRequest struct {
	Scenario string  `json:"scenario"`
	Scale    float64 `json:"scale"`

	Type        string   `json:"type"`
	Resources   []string `json:"resources"`
	Source      string   `json:"source"`
	Description string   `json:"description"`
	Notice      string   `json:"notice"`
	Run         string   `json:"run"`
	Seconds     *int     `json:"durationInSeconds"` // none means −1
	Cancelled   bool     `json:"cancelled"`
}

func (q eventRequest) event() (Event, error) {
	if q.Scenario != "" {
		if q.Type != "" {
			return Event{}, fmt.Errorf("event: want a scenario or a type, got both")
		}
		e, err := Scenario(q.Scenario)
		e.Scale, e.Resources = q.Scale, q.Resources
		return e, err
	}
	e := Event{Type: q.Type, Resources: q.Resources, Source: q.Source, Description: q.Description,
		Seconds: -1, Cancelled: q.Cancelled, Scale: q.Scale}
	if q.Seconds != nil {
		e.Seconds = *q.Seconds
	}
	for _, d := range []struct {
		to   *time.Duration
		name string
		from string
	}{{&e.Notice, "notice", q.Notice}, {&e.Run, "run", q.Run}} {
		if d.from == "" {
			continue
		}
		v, err := time.ParseDuration(d.from)
		if err != nil {
			return Event{}, fmt.Errorf("event: %s: cannot use %q", d.name, d.from)
		}
		*d.to = v
	}
	return e, nil
}

func (s *Server) postEvent(w http.ResponseWriter, r *http.Request) {
	var q eventRequest
	err := readJSON(w, r, &q)
	var e Event
	if err == nil {
		e, err = q.event()
	}
	var id string
	if err == nil {
		id, err = s.AddEvent(e)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	writeJSON(w, http.StatusCreated, map[string]string{"eventId": id})
}
