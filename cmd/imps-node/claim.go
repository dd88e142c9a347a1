package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	authenticationv1client "k8s.io/client-go/kubernetes/typed/authentication/v1"

	impsync "github.com/imps-node/imps/pkg/sync"
)

// nodeClaim is where the API server says which node a token is bound to.
const nodeClaim = "authentication.kubernetes.io/node-name"

// claimTimeout bounds one question to the API server.
const claimTimeout = 10 * time.Second

// duty is one of the duties.
type duty interface {
	// Run works until ctx ends; it returns an error only where going on makes no sense.
	Run(ctx context.Context) error
	// Ready returns why it is not ready, if it is not.
	Ready() error
}

// boundDuty is the node duty. Before it runs, it makes sure that its node is not another
// than that of its token.
type boundDuty struct {
	duty
	node string
	// claim asks the API server for the node of the token; empty where it is bound to none.
	claim func(context.Context) (string, error)
	log   *slog.Logger
}

func (d *boundDuty) Run(ctx context.Context) error {
	node, answered := d.awaitClaim(ctx)
	switch {
	case !answered:
		return nil
	case node == "":
		d.log.Debug("the token is bound to no node, so that the node's name cannot be checked", "node", d.node)
	case node != d.node:
		return fmt.Errorf("--node-name is %q, but the token is bound to node %q: set it to the Pod's spec.nodeName", d.node, node)
	}
	return d.duty.Run(ctx)
}

// awaitClaim asks until it gets an answer, or ctx ends: an agent stays up without an API
// server.
func (d *boundDuty) awaitClaim(ctx context.Context) (node string, answered bool) {
	backoff := wait.Backoff{Duration: 500 * time.Millisecond, Factor: 2, Jitter: 0.2, Cap: 30 * time.Second, Steps: math.MaxInt}
	failed := false
	_ = backoff.DelayFunc().Until(ctx, true, true, func(ctx context.Context) (bool, error) {
		var err error
		node, err = d.claim(ctx)
		answered = err == nil
		switch {
		case !answered && !failed && ctx.Err() == nil:
			failed = true
			d.log.Warn("cannot ask the API server which node the token is bound to, trying again until it answers", "error", impsync.Explain(err))
		case answered && failed:
			d.log.Info("the API server answers again")
		}
		return answered, nil
	}) // its error says that ctx has ended
	return node, answered
}

// claimOf returns the question for the node of the client's own token.
func claimOf(reviews authenticationv1client.SelfSubjectReviewInterface) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, claimTimeout)
		defer cancel()
		review, err := reviews.Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
		switch {
		case apierrors.IsForbidden(err), apierrors.IsNotFound(err):
			return "", nil // a cluster that does not tell
		case err != nil:
			return "", err
		}
		switch nodes := review.Status.UserInfo.Extra[nodeClaim]; len(nodes) {
		case 0:
			return "", nil
		case 1:
			return nodes[0], nil
		default:
			return "", errors.New("the API server names more than one node")
		}
	}
}
