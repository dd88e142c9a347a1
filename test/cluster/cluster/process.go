package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// errStopped is returned where something is to be started after Stop.
var errStopped = errors.New("the cluster is stopped")

// launcher starts processes from one OS thread that lives as long as the
// launcher does. Linux kills a child whose parent-death signal is set when the
// thread that forked it ends, and not only when the whole parent ends; on an
// ordinary goroutine a child would die with the first thread that Go retires.
type launcher struct {
	requests chan func()
	quit     chan struct{} // closed to end the launcher
	done     chan struct{} // closed when it has ended
}

// newLauncher returns one whose thread has run prepare first, where that is not
// nil. What prepare does to the thread, such as giving it namespaces of its own,
// holds for the children and for nobody else.
func newLauncher(prepare func() error) (*launcher, error) {
	l := &launcher{requests: make(chan func()), quit: make(chan struct{}), done: make(chan struct{})}
	prepared := make(chan error, 1)
	go func() {
		defer close(l.done)
		// Never unlocked: the thread ends with this goroutine.
		runtime.LockOSThread()
		if prepare != nil {
			if err := prepare(); err != nil {
				prepared <- err
				return
			}
		}
		prepared <- nil
		for {
			select {
			case request := <-l.requests:
				request()
			case <-l.quit:
				return
			}
		}
	}()
	return l, <-prepared
}

// start starts a command; after close it returns an error.
func (l *launcher) start(cmd *exec.Cmd) error {
	result := make(chan error, 1)
	select {
	case l.requests <- func() { result <- cmd.Start() }:
		return <-result
	case <-l.done:
		return errStopped
	}
}

// close ends the launcher; the processes it started must be gone.
func (l *launcher) close() {
	close(l.quit)
	<-l.done
}

// process is a component that can be started again after it has ended.
type process struct {
	name     Component
	path     string
	args     []string
	dir      string
	log      string
	lifetime context.Context // ends every run
	launcher *launcher
	// untied processes die with the first one of their PID namespace. They
	// cannot be tied to this process: Go has a child kill itself whose parent is
	// not to be seen from where it is.
	untied bool

	mu  sync.Mutex
	run *processRun // the latest run, nil before the first
}

type processRun struct {
	cmd    *exec.Cmd
	cancel context.CancelFunc
	exited chan struct{} // closed when the process has been waited for
	err    error         // what the wait returned; valid once exited is closed
}

func (r *processRun) running() bool {
	if r == nil {
		return false
	}
	select {
	case <-r.exited:
		return false
	default:
		return true
	}
}

func (p *process) start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.run.running() {
		return fmt.Errorf("start %s: it is running already", p.name)
	}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open the log of %s: %w", p.name, err)
	}
	// The child has its own copy of the file once it runs.
	defer func() { _ = log.Close() }()

	ctx, cancel := context.WithCancel(p.lifetime)
	cmd := exec.CommandContext(ctx, p.path, p.args...) //nolint:gosec // a program that Build provided or that the caller named
	cmd.Dir = p.dir
	cmd.Stdout, cmd.Stderr = log, log
	// A bare environment: no proxy, no cloud credentials, no settings of the
	// developer reach the component.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + p.dir, "TMPDIR=" + p.dir}
	// A process group of its own, so that Ctrl-C in a terminal reaches the
	// parent only, which then ends the components.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if !p.untied {
		dieWithParent(cmd.SysProcAttr)
	}

	run := &processRun{cmd: cmd, cancel: cancel, exited: make(chan struct{})}
	if err := p.launcher.start(cmd); err != nil {
		cancel()
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	p.run = run
	go func() {
		defer close(run.exited)
		run.err = cmd.Wait()
		cancel()
	}()
	return nil
}

// kill ends the process and waits until it is gone. It returns false when the
// process was not running.
func (p *process) kill() bool {
	run := p.latest()
	if !run.running() {
		if run != nil {
			<-run.exited
		}
		return false
	}
	run.cancel()
	<-run.exited
	return true
}

func (p *process) signal(sig syscall.Signal) error {
	run := p.latest()
	if !run.running() {
		return fmt.Errorf("signal %s: %w", p.name, ErrNotRunning)
	}
	if err := run.cmd.Process.Signal(sig); err != nil {
		return fmt.Errorf("signal %s: %w", p.name, err)
	}
	return nil
}

func (p *process) running() bool {
	return p.latest().running()
}

// exited returns a channel that is closed when the latest run has ended.
func (p *process) exited() <-chan struct{} {
	return p.latest().exited
}

// exitError says how the latest run ended; call it after exited is closed.
func (p *process) exitError() error {
	if err := p.latest().err; err != nil {
		return err
	}
	return fmt.Errorf("exit status 0: %w", ErrNotRunning)
}

// await polls check until it returns nil, and gives up when the process has
// exited, after readyTimeout, or with the context.
func (p *process) await(ctx context.Context, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, readyTimeout, fmt.Errorf("not ready after %s", readyTimeout))
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.exited():
			return fmt.Errorf("%s exited before it was ready: %w; its log ends:\n%s", p.name, p.exitError(), tail(p.log))
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w, last seen: %w; its log ends:\n%s", p.name, context.Cause(ctx), err, tail(p.log))
		case <-tick.C:
		}
	}
}

func (p *process) latest() *processRun {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.run
}
