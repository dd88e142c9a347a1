package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/test/imps"
)

// logLines are shown of each log after a failure.
const logLines = 12

// start starts the coordinator and, once it has taken the resource over, an agent for each node.
func (d *demo) start(ctx context.Context) error {
	coordinator, err := imps.Coordinator(ctx, d.control)
	if err != nil {
		return err
	}
	coordinator.Env = append(coordinator.Env, d.startAWS()...)
	if err := d.launch(ctx, coordinator); err != nil {
		return err
	}
	// Otherwise the first times would tell how long it takes to be elected.
	if err := d.awaitStatus(ctx, v1alpha1.StatusReady, 0); err != nil {
		return err
	}
	d.say("   coordinator   token of ServiceAccount %s", imps.CoordinatorAccount)

	for _, node := range []string{"node-a", "node-b"} {
		if err := d.launchAgent(ctx, node); err != nil {
			return err
		}
		d.say("   agent-%s  token of ServiceAccount %s, bound to a Pod on %s", node, imps.AgentAccount, node)
	}
	d.note("Each runs with the arguments that the chart gives it, and says that it is ready.")
	return nil
}

// launchAgent starts the agent of a node, with a node cache of its own.
func (d *demo) launchAgent(ctx context.Context, node string) error {
	agent, err := imps.Agent(ctx, d.control, node)
	if err != nil {
		return err
	}
	agent.Args = append(agent.Args, "--node-cache-dir="+d.cacheDir(node))
	return d.launch(ctx, agent)
}

// launch starts an imps-node and waits until it is ready.
func (d *demo) launch(ctx context.Context, spec imps.Spec) error {
	// It outlives the steps, and is stopped when they are over.
	p, err := imps.Start(context.WithoutCancel(ctx), d.control, d.binary, d.dir, spec)
	if err != nil {
		return err
	}
	d.processes = append(d.processes, p)
	go func() {
		if <-p.Ended(); !d.stopping.Load() {
			d.died(fmt.Errorf("%s ended on its own", p.Name))
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	return p.AwaitReady(ctx)
}

// stopProcesses ends all processes as Kubernetes does: SIGTERM, and time to finish. Where anything
// failed, it shows the end of every log.
func (d *demo) stopProcesses(interrupted bool) {
	d.stopping.Store(true)
	for _, p := range d.processes {
		seen := "exit code 0"
		if err := p.Terminate(); err != nil {
			seen = err.Error()
		}
		if !interrupted {
			d.check(p.Name+" ends on SIGTERM with exit code 0", "exit code 0", seen)
		}
	}
	if interrupted || d.failures() == 0 {
		return
	}
	for _, p := range d.processes {
		lines := strings.Split(strings.TrimSpace(p.Log()), "\n")
		d.say("\n   The log of %s ends:", p.Name)
		for _, line := range lines[max(0, len(lines)-logLines):] {
			d.say("   | %s", line)
		}
	}
}
