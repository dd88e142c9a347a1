package main

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	impsync "github.com/imps-node/imps/pkg/sync"
	coordinatorduty "github.com/imps-node/imps/pkg/sync/cluster"
	"github.com/imps-node/imps/test/imps"
)

// newPodInterval is the time between two new Pods.
const newPodInterval = 50 * time.Millisecond

// plan is what happens, in this order.
func (s *simulation) plan() []planned {
	return []planned{
		{"the coordinator starts", s.deliver, s.checkDeliver},
		{"all agents start at once", s.startAll, s.checkStart},
		{"nothing happens", s.idle, s.checkIdle},
		{"the source is rotated", s.rotate, s.checkRotate},
		{"new Pods in new namespaces", s.newPods, s.checkNewPods},
		{"the coordinator is killed and starts, again and again", s.restartCoordinator, s.checkRestartCoordinator},
		{"all agents restart, batch by batch", s.restartAgents, s.checkRestartAgents},
	}
}

// deliver starts the coordinator, which serves what is selected by label.
func (s *simulation) deliver(ctx context.Context, p *phase) error {
	seen, begin := s.watcher.len(), time.Now()
	if err := s.startCoordinator(ctx); err != nil {
		return err
	}
	p.figure("leads after", time.Since(begin).Seconds(), "s")
	added, err := s.awaitChanges(ctx, seen, watch.Added, s.selectedAtFirst())
	if err != nil {
		return err
	}
	p.last(added, begin)
	return nil
}

func (s *simulation) checkDeliver(p *phase) {
	s.expect(p, "Secrets added", s.selectedAtFirst(), p.Changes[watch.Added])
	s.expect(p, "the coordinator's writes of Secrets", s.selectedAtFirst(), p.sum(coordinatorUser, "", "target Secrets").Writes)
}

// startAll starts all agents at once. Their Pods select the other namespaces.
func (s *simulation) startAll(ctx context.Context, p *phase) error {
	seen, begin := s.watcher.len(), time.Now()
	if err := s.startAgents(ctx, s.agents); err != nil {
		return err
	}
	p.figure("all ready after", time.Since(begin).Seconds(), "s")
	added, err := s.awaitChanges(ctx, seen, watch.Added, s.selected()-s.selectedAtFirst())
	if err != nil {
		return err
	}
	p.last(added, begin)
	err = s.await(ctx, "every agent has reported", time.Second, func() (bool, error) {
		reports, err := s.core.CoreV1().ConfigMaps(imps.SystemNamespace).List(ctx, metav1.ListOptions{LabelSelector: impsync.LabelComponent})
		if err != nil {
			return false, fmt.Errorf("list the node reports: %w", err)
		}
		return len(reports.Items) == s.Agents+s.Reports, nil
	})
	p.figure("last report after", time.Since(begin).Seconds(), "s")
	return err
}

func (s *simulation) checkStart(p *phase) {
	s.expect(p, "Secrets added", s.selected()-s.selectedAtFirst(), p.Changes[watch.Added])
	s.expect(p, "Secrets modified", 0, p.Changes[watch.Modified])
	// One whose answer was lost is written again.
	if reports := p.sum(agents, "patch", "node reports"); len(reports.Failed) == 0 {
		s.expect(p, "reports that were written again", 0, reports.Writes-reports.Created)
	}
}

// idle lets time pass. What garbage the start left is no part of what is measured then.
func (s *simulation) idle(ctx context.Context, _ *phase) error {
	debug.FreeOSMemory()
	select {
	case <-time.After(s.Idle):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *simulation) checkIdle(p *phase) {
	for _, by := range []user{agents, coordinatorUser} {
		all := p.sum(by, "", "")
		quiet := p.sum(by, watchOn, "").Requests + p.sum(by, "update", "leases").Requests
		s.expect(p, fmt.Sprintf("what the %s asked beside the Lease and for watches to go on", by), 0, all.Requests-quiet)
	}
}

// rotate gives the source another password.
func (s *simulation) rotate(ctx context.Context, p *phase) error {
	seen := s.watcher.len()
	if err := s.writeSource(ctx); err != nil {
		return err
	}
	begin := time.Now()
	changed, err := s.awaitChanges(ctx, seen, watch.Modified, s.selected())
	if err != nil {
		return err
	}
	p.last(changed, begin)
	rendered, err := s.core.CoreV1().Secrets(imps.RenderedNamespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("read the rendered Secrets: %w", err)
	}
	size := 0
	for i := range rendered.Items {
		size += rendered.Items[i].Size()
	}
	p.figure("rendered Secrets", float64(size), "bytes")
	p.figure("to all agents", float64(size*s.Agents)/mebi, "MiB")
	return nil
}

func (s *simulation) checkRotate(p *phase) {
	s.expect(p, "Secrets modified", s.selected(), p.Changes[watch.Modified])
	s.expect(p, "the coordinator's writes of Secrets", s.selected(), p.sum(coordinatorUser, "", "target Secrets").Writes)
	s.expect(p, "the agents' writes", 0, p.sum(agents, "", "").Writes)
}

// newPods creates a Pod on some of the nodes, each in a namespace that had none, and waits
// for its Secrets.
func (s *simulation) newPods(ctx context.Context, p *phase) error {
	seen := s.watcher.len()
	created := make(map[string]time.Time, s.NewPods)
	tick := time.NewTicker(newPodInterval)
	defer tick.Stop()
	for i := range s.NewPods {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		namespace := s.Namespaces + i
		if _, err := s.createPod(ctx, s.agents[i*s.Agents/s.NewPods].node, namespace, true); err != nil {
			return err
		}
		created[namespaceName(namespace)] = time.Now()
	}
	added, err := s.awaitChanges(ctx, seen, watch.Added, s.NewPods*s.Resources)
	if err != nil {
		return err
	}
	var took []float64
	for namespace, at := range created {
		for i := range s.Resources {
			took = append(took, max(0, added[namespace+"/"+secretName(i)].Sub(at).Seconds()*1000))
		}
	}
	if slices.Sort(took); len(took) > 0 {
		p.figure("Secret after p50", took[len(took)/2], "ms")
		p.figure("p99", took[len(took)*99/100], "ms")
	}
	return nil
}

func (s *simulation) checkNewPods(p *phase) {
	s.expect(p, "Secrets added", s.NewPods*s.Resources, p.Changes[watch.Added])
	s.expect(p, "Secrets modified", 0, p.Changes[watch.Modified])
	s.expect(p, "the agents' writes of Secrets", s.NewPods*s.Resources, p.sum(agents, "", "target Secrets").Writes)
	s.expect(p, "the agents' reports", s.NewPods, p.sum(agents, "", "node reports").Writes)
	s.expect(p, "the coordinator's writes of Secrets", 0, p.sum(coordinatorUser, "", "target Secrets").Writes)
}

// restartCoordinator kills the coordinator and starts it, and again. The Lease of the dead
// one is deleted: what a start costs does not depend on 15 s of waiting for its end.
func (s *simulation) restartCoordinator(ctx context.Context, p *phase) error {
	var took []float64
	for range s.Restarts {
		mark, err := s.mark(ctx)
		if err != nil {
			return err
		}
		ended, err := s.coordinator.usage(false)
		if err != nil {
			return err
		}
		s.coordinator.process.Kill()
		s.coordinator.ended = ended
		err = s.core.CoordinationV1().Leases(imps.SystemNamespace).Delete(ctx, coordinatorduty.LeaseName, metav1.DeleteOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("delete the Lease: %w", err)
		}
		begin := time.Now()
		if err := s.startCoordinator(ctx); err != nil {
			return err
		}
		took = append(took, time.Since(begin).Seconds())
		if err := s.quieten(ctx, mark); err != nil {
			return err
		}
	}
	if slices.Sort(took); len(took) > 0 {
		p.figure("leads after p50", took[len(took)/2], "s")
		p.figure("at most", took[len(took)-1], "s")
	}
	return nil
}

func (s *simulation) checkRestartCoordinator(p *phase) {
	s.expect(p, "the agents' requests but for watches to go on", 0, p.sum(agents, "", "").Requests-p.sum(agents, watchOn, "").Requests)
	s.expect(p, "changes of Secrets", 0, len(p.Changes))
	s.expect(p, "the coordinator's writes but for the Lease", 0, p.sum(coordinatorUser, "", "").Writes-p.sum(coordinatorUser, "", "leases").Writes)
}

// restartAgents stops and starts all agents, as a DaemonSet does when it is updated; but each
// keeps its token, and its Pod.
func (s *simulation) restartAgents(ctx context.Context, p *phase) error {
	begin := time.Now()
	for batch := range slices.Chunk(s.agents, s.Batch) {
		if err := s.stopAgents(batch); err != nil {
			return err
		}
		if err := s.startAgents(ctx, batch); err != nil {
			return err
		}
	}
	p.figure("all ready after", time.Since(begin).Seconds(), "s")
	return nil
}

func (s *simulation) checkRestartAgents(p *phase) {
	s.expect(p, "the agents' writes", 0, p.sum(agents, "", "").Writes)
	s.expect(p, "changes of Secrets", 0, len(p.Changes))
	s.expect(p, "the coordinator's writes but for the Lease", 0, p.sum(coordinatorUser, "", "").Writes-p.sum(coordinatorUser, "", "leases").Writes)
}
