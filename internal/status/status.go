// Package status shows people what a running proxy knows and decides. It changes
// nothing: everything it has can only be read.
package status

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

// Handler answers, over HTTP on a socket that Listen has opened:
//
//	GET  /v1/policy     Policy
//	GET  /v1/workloads  a list of workload.Workload, by ID
//	POST /v1/explain    Question to policy.Explanation
//	GET  /healthz       200 when the proxy is ready, else 503
//
// Errors are {"error": "text"}. It hands out no token, and no answer of the
// metadata service.
type Handler struct {
	Cloud     imds.Cloud
	Policy    *policy.Current
	Directory *workload.Directory
	Ready     func() bool // nil: always
}

// Policy is what is in force.
type Policy struct {
	Snapshot uint64      `json:"snapshot"` // 0: none
	Name     string      `json:"name"`
	Mode     policy.Mode `json:"mode"`
	Rules    int         `json:"rules"`
}

// Question is a request that a workload could make.
type Question struct {
	// Workload is a name or an ID.
	Workload string `json:"workload"`
	Method   string `json:"method"` // empty means GET
	Target   string `json:"target"` // path and query
}

const maxQuestion = 64 << 10 // bytes

// ServeHTTP answers one request.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.Method + " " + r.URL.Path {
	case "GET /v1/policy":
		p := Policy{Name: "none", Mode: policy.Enforce}
		if s := h.Policy.Snapshot(); s != nil {
			p = Policy{s.Number, s.Name(), s.Mode(), s.Len()}
		}
		reply(w, http.StatusOK, p)
	case "GET /v1/workloads":
		reply(w, http.StatusOK, h.Directory.All())
	case "POST /v1/explain":
		h.explain(w, r)
	case "GET /healthz":
		if h.Ready != nil && !h.Ready() {
			reply(w, http.StatusServiceUnavailable, problem{"not ready"})
			return
		}
		reply(w, http.StatusOK, struct{}{})
	default:
		reply(w, http.StatusNotFound, problem{"there is GET /v1/policy, GET /v1/workloads, POST /v1/explain and GET /healthz"})
	}
}

type problem struct {
	Error string `json:"error"`
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // who left does not read
}

func (h *Handler) explain(w http.ResponseWriter, r *http.Request) {
	var q Question
	if err := json.NewDecoder(io.LimitReader(r.Body, maxQuestion)).Decode(&q); err != nil {
		reply(w, http.StatusBadRequest, problem{"not a question: " + err.Error()})
		return
	}
	who, err := h.find(q.Workload)
	if err != nil {
		reply(w, http.StatusNotFound, problem{err.Error()})
		return
	}
	if q.Method == "" {
		q.Method = http.MethodGet
	}
	// What is in the directory was attached by its listener.
	reply(w, http.StatusOK, h.Policy.Snapshot().ExplainTarget(who, workload.Listener, h.Cloud, q.Method, q.Target))
}

// find is by ID, by name, or by the name of a member of a shared namespace.
func (h *Handler) find(name string) (*workload.Workload, error) {
	var found []*workload.Workload
	var names []string
	for _, w := range h.Directory.All() {
		names = append(names, w.Name)
		if string(w.ID) == name {
			return w, nil
		}
		is := w.Name == name
		for _, m := range w.Members {
			is = is || m.Name == name || string(m.ID) == name
		}
		if is {
			found = append(found, w)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, fmt.Errorf("no workload %q: there are %s", name, cmp.Or(strings.Join(names, ", "), "none"))
	}
	return nil, fmt.Errorf("%d workloads have the name %q: give an ID, like %s", len(found), name, found[0].ID)
}

// Serve answers on l until ctx ends; it closes l.
func (h *Handler) Serve(ctx context.Context, l net.Listener) error {
	s := &http.Server{Handler: h, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, MaxHeaderBytes: 16 << 10}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
