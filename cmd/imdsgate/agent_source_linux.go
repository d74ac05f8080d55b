package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"imdsgate/internal/agent"
	"imdsgate/internal/discover"
)

// agentSource tells the agent whose calls to steer: what the engine runs, what
// is on the list, or both.
type agentSource struct {
	out    chan agent.Source
	docker *discover.Docker // nil without --docker
	list   *discover.Static // nil without --workloads
	path   string           // of the list
	log    *slog.Logger
}

func newAgentSource(e *env, f agentFlags, log *slog.Logger) (*agentSource, error) {
	s := &agentSource{out: make(chan agent.Source, 1), path: f.workloads, log: log}
	if f.workloads != "" {
		var err error
		if s.list, err = readWorkloads(f.workloads); err != nil {
			return nil, err
		}
	}
	if !f.docker {
		return s, nil
	}
	host := f.dockerHost
	if host == "" {
		host = e.getenv("DOCKER_HOST")
	}
	if host != "" && !strings.HasPrefix(host, "unix://") {
		return nil, withHint(usageError("docker: %q is no unix socket: the agent watches the engine of its own host", host),
			"give the engine's socket, like --docker-host unix:///var/run/docker.sock")
	}
	s.docker = &discover.Docker{Host: host, NetnsDirs: f.netnsDirs, OnlyLabelled: f.onlyLabelled, Proc: f.proc, Log: log}
	return s, nil
}

// run delivers the source, and delivers it again when SIGHUP has changed the
// list. A bad list changes nothing.
func (s *agentSource) run(ctx context.Context) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	watching := make(chan error, 1)
	if s.docker != nil {
		go func() { watching <- s.docker.Run(ctx) }()
		select {
		case <-s.docker.Ready():
		case err := <-watching:
			return err
		case <-ctx.Done():
			return <-watching
		}
	}
	for {
		select {
		case s.out <- s.source():
		case <-ctx.Done():
		}
		select {
		case <-ctx.Done():
			if s.docker == nil {
				return nil
			}
			return <-watching
		case err := <-watching:
			return err
		case <-hup:
		}
		s.reload()
	}
}

func (s *agentSource) reload() {
	if s.list == nil {
		return
	}
	list, err := readWorkloads(s.path)
	if err != nil {
		s.log.Error("list of workloads not read: the last good one stays", "error", err)
		return
	}
	list.Inherit(s.list)
	s.list = list
	s.log.Info("list of workloads read again", "file", s.path)
}

func (s *agentSource) source() agent.Source {
	switch {
	case s.docker == nil:
		return s.list
	case s.list == nil:
		return s.docker
	}
	return discover.Both{A: s.docker, B: s.list}
}

func readWorkloads(path string) (*discover.Static, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, withHint(usageError("--workloads: %v", err), "give the file with the list of workloads; see 'imdsgate agent --help' for its form")
	}
	s, err := discover.ParseStatic(path, text)
	if err != nil {
		return nil, withHint(usageError("%v", err), "see 'imdsgate agent --help' for the form of the list")
	}
	return s, nil
}
