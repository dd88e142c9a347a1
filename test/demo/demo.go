package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/imps-node/imps/test/cluster/cluster"
)

const (
	// within bounds every wait for something that should take milliseconds.
	within = 20 * time.Second
	// pollInterval is the pause between two looks at what cannot be watched.
	pollInterval = 20 * time.Millisecond
)

// demo is one run.
type demo struct {
	printer
	keep    bool // leave everything running until Ctrl-C
	waiting bool // for that Ctrl-C
	patient bool // also wait for what takes a minute by design

	begin     time.Time
	control   *cluster.Cluster
	client    *kubernetes.Clientset
	dir       string // temporary; holds the binary, the kubeconfigs and the logs
	binary    string
	processes []*process
	died      context.CancelCauseFunc // ends the run when a process ends on its own

	passwords passwords // the current ones
	used      []string  // all that there ever were
	watcher   *watcher
	mark      cluster.Mark // the audit log before the first trigger
	served    []*subject   // the namespaces that have the Secret
	foreignAt string       // the resourceVersion of the Secret that is not imps's
	checks    []check
}

// steps are what the audience sees, in this order.
func (d *demo) steps() []step {
	steps := []step{
		{"A real control plane", d.boot},
		{"imps, built from this source, and its chart", d.install},
		{"Two sources, and an ImagePullSecret with every kind of selector", d.create},
		{"A coordinator and two agents, each with its own identity", d.start},
		{"Secrets reach the selected namespaces", d.deliver},
		{"What the resource says", d.status},
		{"A Secret of that name that is not imps's", d.foreign},
		{"A source is rotated", d.rotate},
		{"Namespaces are deselected", d.prune},
	}
	if d.keep {
		return append(steps, step{"What it took", d.account}, step{"Yours to try", d.wait})
	}
	return append(steps, step{"The resource is deleted", d.remove}, step{"What it took", d.account})
}

type step struct {
	title string
	run   func(context.Context) error
}

// play runs all steps, cleans up, and returns the exit code.
func (d *demo) play(signalled context.Context) int {
	d.begin = time.Now()
	ctx, cancel := context.WithCancelCause(signalled)
	defer cancel(nil)
	d.died = cancel

	var err error
	for i, step := range d.steps() {
		d.say("\n%d. %s", i+1, step.title)
		if err = step.run(ctx); err != nil {
			if cause := context.Cause(ctx); cause != nil && signalled.Err() == nil {
				err = cause // a process that ended is why the step did not work
			}
			break
		}
	}
	interrupted := err != nil && signalled.Err() != nil
	switch {
	case interrupted && d.waiting: // for just that
		interrupted = false
	case interrupted:
		d.say("\nInterrupted: cleaning up.")
	case err != nil:
		d.failed(check{name: "all steps done", want: "no error", seen: err.Error()})
	}
	d.cleanUp(interrupted)
	if interrupted {
		return 1
	}
	return d.summarize()
}

// cleanUp ends everything that runs and removes every file.
func (d *demo) cleanUp(interrupted bool) {
	d.stopProcesses()
	if d.watcher != nil {
		d.watcher.stop()
	}
	d.findPasswords()
	if !interrupted && d.anyFailed() {
		d.showLogs()
	}
	var errs []error
	if d.control != nil {
		errs = append(errs, d.control.Stop())
	}
	if d.dir != "" {
		errs = append(errs, os.RemoveAll(d.dir))
	}
	d.check("the control plane is stopped and all files are removed", "<nil>", fmt.Sprint(errors.Join(errs...)))
}

// boot starts the control plane and makes the folder for all that the demo needs besides.
func (d *demo) boot(ctx context.Context) error {
	d.say("   etcd, kube-apiserver, kube-controller-manager; the first run builds them (about 10 minutes)")
	begin := time.Now()
	var err error
	if d.control, err = cluster.Run(ctx, cluster.WithProgress(indented{d.out})); err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "imps-demo-"); err != nil {
		return fmt.Errorf("create a temporary folder: %w", err)
	}
	d.client = d.control.Client()
	version, err := d.client.Discovery().ServerVersion()
	if err != nil {
		return fmt.Errorf("ask for the version: %w", err)
	}
	d.say("   Kubernetes %s serves on loopback after %.1f s", version.GitVersion, time.Since(begin).Seconds())
	return nil
}

// eventually repeats a look until it finds no fault, or the time is up.
func eventually(ctx context.Context, what string, look func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("not within %s", within))
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := look(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w; last seen: %w", what, context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}
